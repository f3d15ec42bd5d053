"""Everything that touches ComfyUI's internals (0.30.0): the nodes reach them only through here."""
