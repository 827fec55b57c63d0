"""The HTTP front: connections, dispatch and handlers. ``exchange`` is the contract between them."""
