"""How model families write tool calls and thoughts: tables, incremental parsers, grammars. Pure; used by `reply.py`."""
