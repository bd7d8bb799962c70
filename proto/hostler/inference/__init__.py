"""Generated contract `hostler.inference`; the source is the .proto beside the code in v1."""
