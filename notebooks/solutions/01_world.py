"""Solutions of notebook 01."""

import torch


def cut_patches(picture, p):
    side = picture.shape[0] // p
    patches = picture.reshape(side, p, side, p, 3).permute(0, 2, 1, 3, 4)
    return patches.reshape(side * side, p * p * 3)


def nearest_code(patches, entries):
    return (entries.square().sum(1) - 2 * patches @ entries.T).argmin(1)


def kmeans_step(patches, entries):
    code = torch.cdist(patches, entries).argmin(1)
    moved = entries.clone()
    for k in code.unique():
        moved[k] = patches[code == k].mean(0)
    return moved
