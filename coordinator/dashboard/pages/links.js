// Where the pages of a peer and of a layer are.
export const peerLink = (id) => "peer?id=" + encodeURIComponent(id);
export const layerLink = (layer) => "layer?layer=" + layer;
