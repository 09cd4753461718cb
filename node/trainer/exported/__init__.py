"""A model that has left its swarm: the folder that `export` writes, and how it is read again in this process.

`layout` names what is in the folder, `config_file` is its `config.json`, `sums` are the hashes of its files, `loading`
makes a model of it. `modeling_kilohive` or `modeling_kilohive_pretrained`, and what they import, go into the folder
itself and are run by transformers, not from here.
"""
