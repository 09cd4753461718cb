"""Discovery: who is in a run and what they host. node and coordinator import it; it imports protocol, and no torch."""
