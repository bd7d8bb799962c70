"""Kernels for the CPU, written in C++ and compiled for the processor at hand. Above: the text engine's runners."""
