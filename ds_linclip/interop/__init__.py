"""Exchange of weights with open_clip: export, import and pretrained weights."""
