"""What every room shares: the wire contracts, the error tree, channel options, the configuration.

Below this package stand only grpc, protobuf and pydantic; above it, every room.
"""

__version__ = "0.1.0"
