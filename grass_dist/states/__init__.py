"""The optimizer states of the layers: what updates them, where they are, how they come and go (docs/offload.md).

`plan` chooses the mode and says what it costs; `moving` has a class for each mode; `transfer` queues copies, on the
streams of `streams`, between the host buffers of `store` and the device slots.
"""
