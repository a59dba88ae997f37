"""The schedules: for each kind of block its forward and backward over the primitives, written once for every backend, as one
autograd.Function. Nothing here knows which backend runs."""
