"""What the Triton kernels have in common: tile sizes (tiles.py), sums (sums.py) and device functions (device.py; of
weight generators generators.py, of gradients of convolutions gradients.py).

They were proven by Triton's interpreter and by compilation ahead of time; they have not been run on a GPU.
"""
