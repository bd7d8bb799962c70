"""Generated contract `hostler.lifecycle`; the source is the .proto beside the code in v1."""
