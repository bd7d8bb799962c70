"""Generated contract `hostler.placement`; the source is the .proto beside the code in v1."""
