# ruff: noqa
# fmt: off
"""The helper used by the samplers of k-diffusion 0.1.1.post1, unchanged, as an oracle for ours.

Copyright (c) 2022 Katherine Crowson, MIT License (LICENSE beside this file). Whole functions copied from
k_diffusion/utils.py of the published wheel (sha256 of that file
4e0c3aad24cd13b1ad35ef8c19cb9599d82efc12fc3fa8022a6fe3c44e4524f2). The package itself asks for some fifty
others (wandb, torchvision, clip, kornia, ...), replaces numpy and torch by versions of its own choice,
and imports them all before its samplers can be reached; these functions need torch and tqdm.
"""


def append_dims(x, target_dims):
    """Appends dimensions to the end of a tensor until it has target_dims dimensions."""
    dims_to_append = target_dims - x.ndim
    if dims_to_append < 0:
        raise ValueError(f'input has {x.ndim} dims but target_dims is {target_dims}, which is less')
    return x[(...,) + (None,) * dims_to_append]
