"""A long random load of many models on few devices: nothing fails, nothing is mixed up, memory is what was said."""
