"""What the Triton kernels have in common: tile sizes (tiles.py), device functions (device.py; generators.py for those
that train weight generators), sums (sums.py).

They were proven by Triton's interpreter and by compilation ahead of time; they have not been run on a GPU.
"""
