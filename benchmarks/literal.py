"""Literal implementations of scores: one slice, step and window at a time, as in the published scripts.

Nothing is batched, skipped or cached. Networks and random numbers are those of the detectors; all else,
such as noise schedule, masks, windows and descriptors, is implemented here again from the formulas and shares
no code with the detectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bids_uad.methods.base import Detector
from bids_uad.networks.counter_rng import SliceGenerator


def scales(time: float) -> tuple[float, float]:
    """Compute the scales of signal and noise from the angle of the cosine schedule.

    The angle runs from atan(e^-7.5) to its complement, so that the log-signal-to-noise ratio is limited to
    15 before the shift. For images of 224 instead of 56 pixels, the noise is four times as strong.

    Parameters
    ----------
    time : float
        Diffusion time from 0 (signal) to 1 (noise).

    Returns
    -------
    alpha, sigma : float
        Scales, whose squares have the sum 1.
    """
    least = math.atan(math.exp(-7.5))
    noise_to_signal = 224 / 56 * math.tan(least + time * (math.pi / 2 - 2 * least))
    alpha = 1 / math.hypot(1, noise_to_signal)
    return alpha, noise_to_signal * alpha


def _label(value: float, x: Tensor) -> Tensor:
    return torch.tensor([value], dtype=torch.float32, device=x.device)


def andi(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Compute the geometric mean of stacked squared differences of the posterior means."""
    image = 2 * x - 1
    differences = []
    for thousandth in range(125, 25, -detector.hyper.stride):
        time = thousandth / 1000
        alpha, sigma = scales(time)
        # Derivative of the posterior mean one step earlier with respect to the image.
        earlier_alpha, earlier_sigma = scales(time - 0.001)
        weight = earlier_alpha * (1 - (alpha * earlier_sigma / (sigma * earlier_alpha)) ** 2)
        noise = drawn.normal(thousandth, *image.shape[1:])
        noised = alpha * image + sigma * noise
        velocity = detector.network(noised, _label(detector.hyper.time_scale * time, x))
        restored = (alpha * noised - sigma * velocity).clamp(-1, 1)
        squared = (image - restored).square().clamp_min(detector.hyper.residual_floor)
        differences.append(weight**2 * squared)
    return torch.stack(differences).log().mean(0).exp()


def ddpmpp(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Add noise up to the start time, then take deterministic steps back."""
    hyper = detector.hyper
    image = 2 * x - 1
    times = [hyper.start * (1 - step / hyper.denoising_steps) for step in range(hyper.denoising_steps)]
    alpha, sigma = scales(times[0])
    noised = alpha * image + sigma * drawn.normal(0, *image.shape[1:])
    for step, time in enumerate(times):
        alpha, sigma = scales(time)
        velocity = detector.network(noised, _label(hyper.time_scale * time, x))
        restored = (alpha * noised - sigma * velocity).clamp(-1, 1)
        if step + 1 < len(times):
            noise = (noised - alpha * restored) / sigma
            alpha, sigma = scales(times[step + 1])
            noised = alpha * restored + sigma * noise
    return (image - restored).abs() / 2


def riad(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Fill one set of cells after the other, then compare gradients scale by scale."""
    hyper = detector.hyper
    height, width = x.shape[-2:]
    across = torch.tensor([[1.0, 0.0, -1.0]] * 3, device=x.device)[None, None] / 3

    def gradient(image: Tensor) -> Tensor:
        squares = F.conv2d(image, across) ** 2 + F.conv2d(image, across.transpose(2, 3)) ** 2
        return squares.clamp_min(1e-12).sqrt()

    total = torch.zeros_like(x)
    for side in hyper.cell_sizes:
        rows, columns = -(-height // side), -(-width // side)
        order = drawn.uniform(side, rows, columns).flatten().argsort().tolist()
        filled = torch.zeros_like(x)
        for part in range(hyper.n_sets):
            hidden = torch.zeros_like(x, dtype=torch.bool)
            for rank, cell in enumerate(order):
                if rank // math.ceil(len(order) / hyper.n_sets) == part:
                    row, column = side * (cell // columns), side * (cell % columns)
                    hidden[..., row : row + side, column : column + side] = True
            filled[hidden] = detector.network(torch.where(hidden, 0.0, x))[hidden]
        similarity = torch.zeros_like(x)
        first, second = filled, x
        for scale in range(4):
            if scale:
                first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
            a, b = gradient(first), gradient(second)
            gms = (2 * a * b + 0.0026) / (a * a + b * b + 0.0026)
            similarity += F.interpolate(gms, size=(height, width), mode="bilinear")
        weight = 1 / (rows * columns) if hyper.weight_by_cells else 1 / len(hyper.cell_sizes)
        total += weight * (1 - similarity / 4)
    return total


def itermask(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Fill and shrink the mask until it hardly shrinks."""
    hyper = detector.hyper
    image = 6 * x - 3
    spectrum = torch.fft.fft2(image)
    rows = torch.fft.fftfreq(x.shape[-2], device=x.device)[:, None] * 224
    columns = torch.fft.fftfreq(x.shape[-1], device=x.device)[None] * 224
    low = rows**2 + columns**2 < hyper.radius**2
    condition = torch.fft.ifft2(torch.where(low, torch.exp(1j * spectrum.angle()), spectrum)).real
    first = (image - detector.first(condition)) ** 2
    ordered = first[brain].sort(descending=True).values
    count = math.ceil(hyper.initial_mask_fraction * len(ordered))
    limit = ordered[count] if count < len(ordered) else -1.0
    mask = (first > limit) & brain
    frozen, scores = torch.zeros_like(image), torch.minimum(first, detector.threshold)
    # The first mask is compared with the brain as later ones are with the mask before.
    shrunk = len(ordered) and len(ordered) - count >= hyper.min_shrinkage * len(ordered)
    if hyper.whole_brain and not shrunk:
        return image**2
    for number in itertools.count():
        noise = drawn.normal(number, *image.shape[1:])
        filled = detector.filler(torch.cat([torch.where(mask, noise, image), condition], 1))
        error = (image - torch.where(mask, filled, image)) ** 2
        scores = torch.where(mask, error, scores)
        before = int(mask.sum())
        mask = (error > detector.threshold) & brain & mask
        frozen = filled
        if before == 0 or before - int(mask.sum()) < hyper.min_shrinkage * before:
            break
    return (image - frozen) ** 2 if hyper.whole_brain else scores


def disyre(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Blend the restored windows to a slice for each label, and average the changes of the slice."""
    hyper = detector.hyper
    height, width = hyper.window
    offsets = [torch.arange(n, device=x.device) - (n - 1) / 2 for n in hyper.window]
    profiles = [torch.exp(-0.5 * (offset / (len(offset) / 8)) ** 2) for offset in offsets]
    weight = (profiles[0][:, None] * profiles[1][None]).clamp_min(1e-3)
    changes = []
    for label in hyper.labels:
        total, norm = torch.zeros_like(x), torch.zeros_like(x)
        for row in [*range(0, x.shape[-2] - height, hyper.stride), x.shape[-2] - height]:
            for column in [*range(0, x.shape[-1] - width, hyper.stride), x.shape[-1] - width]:
                window = (..., slice(row, row + height), slice(column, column + width))
                patch = 2 * x[window] - 1
                output = detector.network(patch, _label(label, x))
                total[window] += weight * (patch + output if hyper.predict_residual else output)
                norm[window] += weight
        changes.append((2 * x - 1 - total / norm).abs())
    result = torch.stack(changes).mean(0)
    return result * brain.float().mean() if hyper.foreground_weighting else result


def _feature_maps(detector: Detector, x: Tensor) -> list[Tensor]:
    return detector.backbone(x, None, detector.hyper.backbone.taps)


def _enlarged(part: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(part, size=size, mode="bilinear", align_corners=True)


def fae(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Compare stacked and restored features by SSIM in full windows, a convolution for each moment."""
    maps = _feature_maps(detector, x)
    features = torch.cat([_enlarged(part, maps[0].shape[-2:]) for part in maps], 1)
    restored = detector.autoencoder(features)
    side, channels = detector.hyper.scoring_window, features.shape[1]
    profile = torch.tensor(
        [math.exp(-(((k - side // 2) / 1.5) ** 2) / 2) for k in range(side)], device=x.device
    )
    window = (
        (profile[:, None] * profile[None] / profile.sum() ** 2).expand(channels, 1, side, side).contiguous()
    )

    def mean(moment: Tensor) -> Tensor:
        return F.conv2d(moment, window, padding=side // 2, groups=channels)

    a, b = mean(features), mean(restored)
    var_a, var_b = mean(features**2) - a**2, mean(restored**2) - b**2
    covariance = mean(features * restored) - a * b
    similarity = (2 * a * b + 0.01**2) * (2 * covariance + 0.03**2)
    similarity = similarity / ((a**2 + b**2 + 0.01**2) * (var_a + var_b + 0.03**2))
    return _enlarged(1 - similarity.mean(1, keepdim=True), x.shape[-2:])


def rd(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Sum the enlarged cosine distances of the maps of teacher and student."""
    teacher = _feature_maps(detector, x)
    total = torch.zeros_like(x)
    for a, b in zip(teacher, detector.student(detector.embedding(teacher)), strict=True):
        total += _enlarged(1 - F.cosine_similarity(a, b)[:, None], x.shape[-2:])
    return total


def uniad(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Compute the distance of each token and the restored token."""
    grid = (detector.hyper.grid, detector.hyper.grid)
    tokens = torch.cat([_enlarged(part, grid) for part in _feature_maps(detector, x)], 1)
    restored = detector.transformer(tokens.flatten(2).transpose(1, 2)).transpose(1, 2).view(tokens.shape)
    return _enlarged((tokens - restored).square().sum(1, keepdim=True).sqrt(), x.shape[-2:])


def patchcore(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Compute the distances of all descriptors of a slice to all of the bank.

    The published descriptor pools the values of an unfolded neighbourhood in each map, then both together.
    """
    side = detector.hyper.neighbourhood
    fine, coarse = _feature_maps(detector, x)
    height, width = fine.shape[-2:]
    around = [
        F.unfold(part, side, padding=side // 2).view(part.shape[1], side**2, *part.shape[-2:])
        for part in (fine, coarse)
    ]
    around[1] = F.interpolate(around[1], size=(height, width), mode="bilinear")
    if detector.hyper.descriptor == "pooled":
        described = torch.cat([part.mean(1) for part in around])
    else:
        length = 2 * fine.shape[1]
        # One row of values for each location.
        rows = [part.flatten(0, 1).flatten(1).T for part in around]
        rows = [F.adaptive_avg_pool1d(part[:, None], length) for part in rows]
        described = F.adaptive_avg_pool1d(torch.cat(rows, 2), length)[:, 0].T.unflatten(1, (height, width))
    described = (described.movedim(0, -1) - detector.centre) / detector.spread
    distance = torch.cdist(described.flatten(0, 1), detector.bank.float()).amin(1).view(1, 1, height, width)
    if detector.hyper.squared_distance:
        distance = distance**2
    if not detector.hyper.score_outside_brain:
        distance = distance * (F.max_pool2d(brain.float(), x.shape[-1] // width) > 0)
    return F.interpolate(distance, size=x.shape[-2:], mode="bilinear")


def single(detector: Detector, x: Tensor, brain: Tensor, drawn: SliceGenerator) -> Tensor:
    """Return the score of a detector with a single pass, which has no loop to unroll."""
    return detector.score(x, brain, drawn)


LITERAL: dict[str, Callable[[Detector, Tensor, Tensor, SliceGenerator], Tensor]] = {
    "andi": andi,
    "ddpmpp": ddpmpp,
    "riad": riad,
    "itermask": itermask,
    "disyre": disyre,
    "fae": fae,
    "rd": rd,
    "uniad": uniad,
    "patchcore": patchcore,
}
