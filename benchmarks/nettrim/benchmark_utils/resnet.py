"""ResNet-20 and -32 for CIFAR-10 (He et al. 2016), and images, from a folder with resnet20.npz and cifar10.npz."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: strided pixels, channels padded with zeros."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - before) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + shortcut)


def stage(before, width, stride, blocks):
    return nn.Sequential(Block(before, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """6 * blocks + 2 layers: 3 blocks a stage make ResNet-20, 5 ResNet-32."""

    def __init__(self, blocks=3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2 = stage(16, 16, 1, blocks), stage(16, 32, 2, blocks)
        self.layer3, self.linear = stage(32, 64, 2, blocks), nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def resnet20(folder):
    """The trained network, in evaluation mode."""
    return resnet(folder, 20)


def resnet(folder, depth):
    """The trained network of 20 or 32 layers, in evaluation mode."""
    model = ResNet((depth - 2) // 6)
    with np.load(folder / f"resnet{depth}.npz") as arrays:
        state = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    # the counters of batches are the only state that the file may lack
    absent = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict({**absent, **state})
    return model.eval()


def cifar10(folder, split, count=None):
    """Normalised images (count, 3, 32, 32) float32 and their labels."""
    with np.load(folder / "cifar10.npz") as arrays:
        x, y = arrays[f"x_{split}"][:count], arrays[f"y_{split}"][:count]
    images = torch.from_numpy(x).float() / 255
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], torch.from_numpy(y).long()
