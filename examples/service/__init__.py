"""A service: images in, what a network makes of them out, over HTTP. README.md says how to start it.

It is an example to read and to take from; nothing of the package needs it.
"""
