"""One view of a batch: crop, antialiased resize, mirror, colours, normalise; uint8 in, fp32 out.

The mathematics of softcl/data/views.py, with one row of a table of parameters per sample. What
follows there, a blur, commutes with the normalisation: the caller blurs the result.

    resize   a separable triangle filter, max(scale, 1) wide, over the pixels of the crop
    colours  brightness, contrast and saturation in the sample's order, the hue among them; then
             grey. Contrast mixes in the view's mean grey as it is at that moment.

Tiling: a program per sample, BLOCK pixels of the view at a time, their three channels in registers.
A jittered sample is swept twice, first for that mean. Traffic: TAPS^2 bytes read per number, nearly
all from L1 (neighbouring pixels share them), and 4 written.
"""

import torch
import triton
import triton.language as tl

from .launch import launch as launch_kernel

# The table of parameters: softcl.data.recipe.Parameters, a number each. A flag is set above 0.
STRIDE = tl.constexpr(15)  # numbers in a row
JITTERED, ORDER, FACTORS, HUE, GRAYED = (tl.constexpr(column) for column in (5, 6, 7, 10, 11))
CONTRAST = tl.constexpr(1)  # of softcl.data.views
SATURATION = tl.constexpr(2)


@triton.jit
def axis_weight(position, centre, inverse_width, start, length):
    """Weight (BLOCK,) of the input at `position` in outputs centred at `centre`; 0 outside."""
    middle = position + 0.5
    weight = tl.maximum(1.0 - tl.abs(middle - centre) * inverse_width, 0.0)
    inside = (middle > start) & (middle < start + length)
    return tl.where(inside, weight, 0.0)


@triton.jit
def resized_pixels(
    image_ptr,  # (3, H, W) uint8
    row_ptr,  # of the table
    pixel,  # (BLOCK,) of the view, row by row
    H,
    W,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Red, green and blue (BLOCK,) in [0, 1]."""
    top = tl.load(row_ptr)
    left = tl.load(row_ptr + 1)
    height = tl.load(row_ptr + 2)
    width = tl.load(row_ptr + 3)
    mirror = tl.load(row_ptr + 4)
    across = (pixel % SIZE).to(tl.float32) + 0.5
    across = tl.where(mirror > 0.0, SIZE - across, across)
    row_scale = height / SIZE
    column_scale = width / SIZE
    row_width = tl.maximum(row_scale, 1.0)
    column_width = tl.maximum(column_scale, 1.0)
    row_centre = top + ((pixel // SIZE).to(tl.float32) + 0.5) * row_scale
    column_centre = left + across * column_scale
    # The first input whose middle lies within the filter, and one more before it for rounding.
    first_row = tl.floor(row_centre - row_width - 0.5)
    first_column = tl.floor(column_centre - column_width - 0.5)
    red = tl.zeros(pixel.shape, tl.float32)
    green = tl.zeros(pixel.shape, tl.float32)
    blue = tl.zeros(pixel.shape, tl.float32)
    total = tl.zeros(pixel.shape, tl.float32)
    for i in range(TAPS):
        row = first_row + i
        row_weight = axis_weight(row, row_centre, 1.0 / row_width, top, height)
        for j in range(TAPS):
            column = first_column + j
            column_weight = axis_weight(column, column_centre, 1.0 / column_width, left, width)
            weight = row_weight * column_weight
            place = image_ptr + row.to(tl.int32) * W + column.to(tl.int32)
            mask = weight > 0.0
            red += weight * tl.load(place, mask=mask, other=0).to(tl.float32)
            green += weight * tl.load(place + H * W, mask=mask, other=0).to(tl.float32)
            blue += weight * tl.load(place + 2 * H * W, mask=mask, other=0).to(tl.float32)
            total += weight
    scale = 1.0 / (255.0 * tl.maximum(total, 1e-30))  # 0 beyond the last pixel
    return red * scale, green * scale, blue * scale


@triton.jit
def gray(red, green, blue):
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def blend(red, green, blue, kind, factor, mean):
    """clamp(factor x + (1 - factor) reference, 0, 1); black, the mean or the pixel's own grey."""
    own = tl.where(kind == SATURATION, gray(red, green, blue), 0.0)
    reference = (1.0 - factor) * tl.where(kind == CONTRAST, mean, own)
    red = tl.minimum(tl.maximum(factor * red + reference, 0.0), 1.0)
    green = tl.minimum(tl.maximum(factor * green + reference, 0.0), 1.0)
    blue = tl.minimum(tl.maximum(factor * blue + reference, 0.0), 1.0)
    return red, green, blue


@triton.jit
def hue_peak(hue, peak, smallest, spread):
    """The channel that peaks at hue `peak` of 0 .. 6."""
    distance = hue - peak
    distance -= 6.0 * tl.floor(distance / 6.0 + 0.5)
    weight = tl.minimum(tl.maximum(2.0 - tl.abs(distance), 0.0), 1.0)
    return smallest + weight * spread


@triton.jit
def shift_hue(red, green, blue, shift):
    """Turn the hue by `shift` turns at constant saturation and value."""
    largest = tl.maximum(tl.maximum(red, green), blue)
    smallest = tl.minimum(tl.minimum(red, green), blue)
    spread = largest - smallest
    is_red = largest == red
    is_green = largest == green
    hue = tl.where(is_red, green - blue, tl.where(is_green, blue - red, red - green))
    offset = tl.where(is_red, 0.0, tl.where(is_green, 2.0, 4.0))
    hue = hue / tl.maximum(spread, 1e-12) + offset + 6.0 * shift
    red = hue_peak(hue, 0.0, smallest, spread)
    green = hue_peak(hue, 2.0, smallest, spread)
    blue = hue_peak(hue, 4.0, smallest, spread)
    return red, green, blue


@triton.jit
def jitter(red, green, blue, row_ptr, mean, UNTIL_CONTRAST: tl.constexpr):
    """The four operations in the sample's order; or those that come before its contrast alone."""
    shift = tl.load(row_ptr + HUE)
    order = tl.load(row_ptr + ORDER).to(tl.int32)
    kind = order % 3
    step = 1 + order // 3 % 2  # between the kinds of blends that follow each other
    go = tl.full((), 1, tl.int32)
    for slot in tl.static_range(4):
        if (order // 6 == slot) & (go > 0):
            red, green, blue = shift_hue(red, green, blue, shift)
        if slot < 3:
            factor = tl.load(row_ptr + FACTORS + kind)
            if UNTIL_CONTRAST:
                go = tl.where(kind == CONTRAST, 0, go)
                factor = tl.where(go > 0, factor, 1.0)
            red, green, blue = blend(red, green, blue, kind, factor, mean)
            kind = (kind + step) % 3
    return red, green, blue


@triton.jit(do_not_specialize=["H", "W"])
def view_kernel(
    images_ptr,  # (N, 3, H, W) uint8
    table_ptr,  # (N, STRIDE) fp32
    constants_ptr,  # (2, 3) fp32: 1 / std and -mean / std
    view_ptr,  # (N, 3, SIZE, SIZE) fp32 out
    H,
    W,
    COLORS: tl.constexpr,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    image_ptr = images_ptr + n * 3 * H * W
    row_ptr = table_ptr + n * STRIDE
    PIXELS: tl.constexpr = SIZE * SIZE
    jittered = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    if COLORS:
        jittered = tl.load(row_ptr + JITTERED)
        if jittered > 0.0:
            sums = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, PIXELS, BLOCK):
                pixel = start + tl.arange(0, BLOCK)
                red, green, blue = resized_pixels(image_ptr, row_ptr, pixel, H, W, SIZE, TAPS)
                red, green, blue = jitter(red, green, blue, row_ptr, 0.0, True)
                sums += tl.where(pixel < PIXELS, gray(red, green, blue), 0.0)
            mean = tl.sum(sums, 0) / PIXELS
    for start in range(0, PIXELS, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        red, green, blue = resized_pixels(image_ptr, row_ptr, pixel, H, W, SIZE, TAPS)
        if COLORS:
            if jittered > 0.0:
                red, green, blue = jitter(red, green, blue, row_ptr, mean, False)
            grayed = tl.load(row_ptr + GRAYED) > 0.0
            shade = gray(red, green, blue)
            red = tl.where(grayed, shade, red)
            green = tl.where(grayed, shade, green)
            blue = tl.where(grayed, shade, blue)
        mask = pixel < PIXELS
        out_ptr = view_ptr + n * 3 * PIXELS + pixel
        red = red * tl.load(constants_ptr) + tl.load(constants_ptr + 3)
        green = green * tl.load(constants_ptr + 1) + tl.load(constants_ptr + 4)
        blue = blue * tl.load(constants_ptr + 2) + tl.load(constants_ptr + 5)
        tl.store(out_ptr, red, mask=mask)
        tl.store(out_ptr + PIXELS, green, mask=mask)
        tl.store(out_ptr + 2 * PIXELS, blue, mask=mask)


# ------------------------------------------------------------------------------------------ launch


def constants_for(height: int, width: int, size: int, colors: bool) -> tuple[bool, int, int, int]:
    """The kernel's compile-time arguments: COLORS, SIZE, TAPS, BLOCK."""
    # A filter of half width w >= 1 meets at most ceil(2 w) inputs; one more for rounding.
    widest = max(height / size, width / size, 1.0)
    taps = -int(-2 * widest // 1) + 1
    return colors, size, taps, max(16, min(1024, 1 << (size * size - 1).bit_length()))


def warps_for(block: int) -> int:
    """Warps of a program. 8 for a whole block: 4 would take up to 168 registers a thread."""
    return 8 if block == 1024 else 4


def launch(
    images: torch.Tensor,  # (N, 3, H, W) uint8, contiguous
    table: torch.Tensor,  # (N, STRIDE) float32, contiguous
    constants: torch.Tensor,  # (2, 3) float32: 1 / std and -mean / std
    size: int,
    colors: bool,
) -> torch.Tensor:
    """The views (N, 3, size, size) float32. Nothing waits for the device."""
    N, _, H, W = images.shape
    views = torch.empty((N, 3, size, size), device=images.device)
    if N:
        constant = constants_for(H, W, size, colors)
        arguments = (images, table, constants, views, H, W)
        warps = warps_for(constant[-1])
        launch_kernel(view_kernel, (N, 1), arguments, constant, num_warps=warps)
    return views
