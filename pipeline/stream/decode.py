"""The DALI graphs: stored images and random draws -> pixels.

CPU and GPU graphs are the same operators; `device` chooses where each runs:

    decode (only the region of the crop) [-> resize] [-> augment] -> crop_mirror_normalize

Bytes that stay as they lie (uint8, NHWC, no augmentation) are only flipped in the end, which costs
less than `crop_mirror_normalize`. Other raw images need that alone, which then crops as well; they
are sliced first for what stands in brackets: a crop that is resized, and an augmentation of the
user's.

The colour shift is folded into the mean that `crop_mirror_normalize` subtracts anyway (a mean of
its own for each sample), so the paper's PCA colour costs no pass over the pixels.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline.dataset.images import Encoding
from pipeline.stream import operators as dali
from pipeline.stream.augment import Draw, NamedDraw
from pipeline.stream.config import StreamConfig
from pipeline.stream.transfer import current_stream, select_gpu, to_tensor
from pipeline.tools.errors import UsageError
from pipeline.tools.units import cpu_count

# Small host buffers come from a pool of DALI's own instead of malloc: what is left to malloc, a few
# large blocks, then always fits where it was. The process keeps one size (where it wandered by a
# third) and takes no page faults, which were a third of the time (measured). DALI reads this when
# the first pipeline is built; a value that the user has set is kept.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")


class DecoderInput(NamedTuple):
    """Input of one run of the graph: b samples."""

    images: list[npt.NDArray[np.uint8]]
    """JPEGs, [size] each, or raw images, [side, side, 3] each. DALI reads them where they lie: they
    stay untouched until the batch after next has come out."""
    x: npt.NDArray[np.float32]
    """[b] left edge of the crop, as a fraction 0..1 of the free border."""
    y: npt.NDArray[np.float32]
    """[b] upper edge of the crop, as a fraction 0..1 of the free border."""
    flip: npt.NDArray[np.int32]
    """[b] 1 to mirror."""
    mean: npt.NDArray[np.float32]
    """[b, 3] what to subtract from each channel."""
    divisor: npt.NDArray[np.float32] | None = None
    """[b], or [b, 3] for each channel: what to divide by in the end; only read where the config
    divides."""
    region: npt.NDArray[np.int32] | None = None
    """[b, 4] upper edge, left edge, height and width in pixels of a crop that is resized, where `x`
    and `y` are not read; only read there."""
    masks: Sequence[list[npt.NDArray[np.uint8]]] = ()
    """Masks: for each of the config b arrays [height, width, 1], as large as their images."""
    draws: Sequence[npt.NDArray[Any]] = ()
    """[b] or [b, count] each: the draws of the augmentation, in the order of `list_draws`."""


class DecodedBatch(NamedTuple):
    """Output of one run of the graph: b samples, in memory of their own."""

    images: torch.Tensor
    """[b, 3, height, width] pixels."""
    masks: list[torch.Tensor]
    """uint8 [b, height, width] of each mask of the config."""
    crops: torch.Tensor | None = None
    """uint8 [b, height, width, 3]: the crops of which `images` were made; only of a decoder that
    keeps them."""


class Decoder:
    """A running DALI pipeline over a source of `DecoderInput`s."""

    def __init__(
        self,
        source: Callable[[], DecoderInput],
        config: StreamConfig,
        encoding: Encoding = "jpeg",
        draws: Sequence[NamedDraw] = (),
        *,
        keep_crops: bool = False,
    ) -> None:
        """Build the graph.

        Args:
            source: called ahead of need, once a batch; raises StopIteration at the end.
            config: device, threads, prefetch and what is done to pixels; an input has at most
                `slice_size` samples.
            encoding: of the images.
            draws: what `list_draws` returns for the config.
            keep_crops: deliver the crops as well: of a graph on a CPU that makes such, without an
                augmentation.

        Raises:
            SetupError: device `gpu` without a CUDA device.
        """
        self._config = config
        self._keeps_crops = keep_crops

        def begin() -> _Nodes:
            return _open_source(source, config, encoding, draws)

        if config.augment is None:
            self._pipe = open_pipeline(config)
            with self._pipe:
                nodes = begin()
                masks = cut_masks(config, nodes.masks, **nodes.inputs)
                if keep_crops:
                    crops, finish = _split_graph(config, encoding, nodes.inputs)
                    self._pipe.set_outputs(finish(crops), crops, *masks)
                else:
                    pixels = make_pixels(config, encoding, **nodes.inputs)
                    self._pipe.set_outputs(pixels, *masks)
        else:
            self._pipe = _build_augmented(config, lambda: _begin_crops(config, encoding, begin()))
        self._pipe.build()

    def run(self) -> DecodedBatch:
        """Return the next batch.

        Raises:
            StopIteration: the source has ended.
            UsageError: the augmentation has changed the shape of an image.
            RuntimeError: most likely an image cannot be decoded (`quarantine.TrialDecoder` finds
                it); its whole batch is lost, and this decoder with it.
        """
        gpu = self._pipe.device_id
        output, *others = self._pipe.run(current_stream(gpu))  # as `run_on_current_stream`
        if self._config.augment is not None:
            _check_shapes(self._config, output)
        images = to_batch(self._config, to_tensor(output, gpu))
        crops = to_tensor(others.pop(0), gpu) if self._keeps_crops else None
        return DecodedBatch(images, [to_tensor(one, gpu).squeeze(-1) for one in others], crops)


def run_on_current_stream(pipe: dali.Pipeline) -> Any:
    """Run a pipeline of one output and return it, a list of tensors of DALI's.

    On a GPU it may still be in the making: torch's current stream of that GPU waits for it, and the
    host only until DALI's threads have launched their work.
    """
    (output,) = pipe.run(current_stream(pipe.device_id))  # positional only
    return output


def run_to_tensor(pipe: dali.Pipeline) -> torch.Tensor:
    """Run a pipeline of one dense output and return that as a tensor, on the pipeline's device."""
    return to_tensor(run_on_current_stream(pipe), pipe.device_id)


def to_batch(config: StreamConfig, pixels: torch.Tensor) -> torch.Tensor:
    """Return the pixels that DALI made as [b, 3, height, width] of the config's type."""
    if config.layout == "NHWC":
        pixels = pixels.permute(0, 3, 1, 2)
    # DALI makes all types but this one.
    return pixels.to(torch.bfloat16) if config.pixel_dtype == "bfloat16" else pixels


def open_pipeline(config: StreamConfig, **options: Any) -> dali.Pipeline:
    """Return an empty DALI pipeline with the batch, threads, device and prefetch of a config.

    Raises:
        SetupError: device `gpu` without a CUDA device.
    """
    return dali.Pipeline(**_pipeline_options(config), **options)


def _pipeline_options(config: StreamConfig) -> dict[str, Any]:
    return {
        "batch_size": config.slice_size,
        "num_threads": config.threads or cpu_count(),
        "device_id": select_gpu(config.device),
        "prefetch_queue_depth": config.prefetch,
    }


def make_pixels(
    config: StreamConfig,
    encoding: Encoding,
    *,
    images: Any,
    flip: Any,
    mean: Any = None,
    x: Any = None,
    y: Any = None,
    region: Any = None,
    divisor: Any = None,
) -> Any:
    """Return the whole graph without an augmentation: stored images -> [3, height, width] pixels.

    `images` and what follows are DALI nodes (or constants) as in `DecoderInput`; the result is one.
    """
    if encoding == "raw" and region is None and not _is_stored(config):
        pixels = images.gpu() if config.on_gpu else images
        return normalize_crops(config, pixels, flip, mean, divisor, _crop(config, x, y))
    crops = cut_crops(config, encoding, images, x, y, region)
    return normalize_crops(config, crops, flip, mean, divisor)


def cut_crops(
    config: StreamConfig, encoding: Encoding, images: Any, x: Any, y: Any, region: Any = None
) -> Any:
    """Return the first half of the graph: stored images -> the crop, uint8 [height, width, 3]."""
    if encoding == "jpeg":
        return decode_crops(config, images, x, y, region)
    pixels = images.gpu() if config.on_gpu else images
    if region is not None:
        return resize_crops(config, dali.fn.slice(pixels, **_slice(region)))
    return dali.fn.crop(pixels, **_crop(config, x, y))


def decode_crops(config: StreamConfig, jpegs: Any, x: Any, y: Any, region: Any = None) -> Any:
    """Return the crop of JPEGs, uint8 [height, width, 3]."""
    options = decoder_options(config)
    if region is not None:
        crops = dali.fn.decoders.image_slice(jpegs, **_slice(region), **options)
        return resize_crops(config, crops)
    return dali.fn.decoders.image_crop(jpegs, **_crop(config, x, y), **options)


def decoder_options(config: StreamConfig) -> dict[str, Any]:
    """Return the arguments of DALI's decoders that follow from a config."""
    return {
        "device": "mixed" if config.on_gpu else "cpu",
        "output_type": dali.types.RGB,
        # GPU chroma upsampling then follows libjpeg-turbo's, which the CPU graph uses.
        "jpeg_fancy_upsampling": True,
        "hw_decoder_load": config.hw_decoder_load,
        # True, DALI's default, ties its GPU decoder's threads to cores near the GPU of this number
        # in the driver's count: another one wherever CUDA_VISIBLE_DEVICES leaves some out.
        "affine": False,
    }


def cut_masks(
    config: StreamConfig,
    masks: Sequence[Any],
    *,
    flip: Any,
    x: Any = None,
    y: Any = None,
    region: Any = None,
    **_: Any,
) -> list[Any]:
    """Return masks, [height, width, 1], cut, resized and flipped as `make_pixels` does images."""
    cut = []
    for mask in masks:
        node = mask.gpu() if config.on_gpu else mask
        if region is None:
            node = dali.fn.crop(node, **_crop(config, x, y))
        else:
            nearest = {"size": list(config.image_size), "interp_type": dali.types.INTERP_NN}
            node = dali.fn.resize(dali.fn.slice(node, **_slice(region)), **nearest)
        cut.append(dali.fn.flip(node, horizontal=flip))
    return cut


def _slice(region: Any) -> dict[str, Any]:
    return {"start": region[:2], "shape": region[2:], "axis_names": "HW"}


def resize_crops(config: StreamConfig, crops: Any) -> Any:
    """Resize to the config's size: linear, with a wider filter to shrink, as Pillow does.

    DALI sums in float32 over a triangle of radius max(1, scale) around each pixel's center, and
    rounds once; beyond the border it repeats the edge (`resampling_impl_cpu.h`). So it is within
    0.5 of the exact sum M. Pillow rounds after either axis (`Resample.c`): within 1 of M. The two
    differ by less than 2 levels, hence by 1 at most, where the triangle lies inside the crop: all
    but the outermost pixels of a crop that shrinks. There Pillow leaves out what is beyond the
    border, 1/8 of the triangle at most: 255/8 + 1.5 levels at an edge, 255 * 15/64 + 1.5 in a
    corner.
    """
    return dali.fn.resize(
        crops, size=list(config.image_size), interp_type=dali.types.INTERP_LINEAR, antialias=True
    )


def normalize_crops(
    config: StreamConfig,
    pixels: Any,
    flip: Any,
    mean: Any = None,
    divisor: Any = None,
    crop: dict[str, Any] | None = None,
) -> Any:
    """Add the second half of `make_pixels`: flip, mean, divisor and layout; cut raw images."""
    if _is_stored(config):
        return dali.fn.flip(pixels, horizontal=flip)
    more = {} if divisor is None else {"std": divisor}
    return dali.fn.crop_mirror_normalize(
        pixels,
        mirror=flip,
        mean=mean,
        dtype=getattr(dali.types, _DALI_TYPES[config.pixel_dtype]),
        output_layout=config.layout[1:],
        **more,
        **(crop or {}),
    )


def _is_stored(config: StreamConfig) -> bool:
    """Return whether pixels keep the type and the layout in which they are decoded."""
    # An augmentation may return floats.
    return (config.pixel_dtype, config.layout, config.augment) == ("uint8", "NHWC", None)


_DALI_TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "FLOAT", "uint8": "UINT8"}


def _crop(config: StreamConfig, x: Any, y: Any) -> dict[str, Any]:
    return {"crop_pos_x": x, "crop_pos_y": y, "crop": config.image_size, "rounding": "round"}


_InputType: TypeAlias = tuple[Any, int, str]
"""Type, dimensions and layout of an input of the graph."""


def _list_inputs(config: StreamConfig, encoding: Encoding) -> dict[str, _InputType]:
    """Return the fields of a `DecoderInput` that the graph of a config takes, besides the draws."""
    number, numbers = (dali.types.FLOAT, 0, ""), (dali.types.FLOAT, 1, "")
    inputs = {
        "images": (dali.types.UINT8, 3, "HWC") if encoding == "raw" else (dali.types.UINT8, 1, "")
    }
    if config.crop == "resized":
        inputs["region"] = dali.types.INT32, 1, ""
    else:
        inputs |= {"x": number, "y": number}
    inputs["flip"] = dali.types.INT32, 0, ""
    if not _is_stored(config):
        inputs["mean"] = numbers
    if config.is_divided or config.std is not None:
        inputs["divisor"] = number if config.std is None else numbers
    return inputs


class _Nodes(NamedTuple):
    """Nodes of a graph that its source feeds."""

    inputs: dict[str, Any]
    """Node of each field of a `DecoderInput` that `_list_inputs` names."""
    masks: list[Any]
    """Node of each mask of the config."""
    draws: dict[str, Any]
    """Node of each draw, by its name."""


def _open_source(
    source: Callable[[], DecoderInput],
    config: StreamConfig,
    encoding: Encoding,
    draws: Sequence[NamedDraw],
) -> _Nodes:
    """Add a source to the graph that is being built; arguments as those of `Decoder`."""
    inputs = _list_inputs(config, encoding)
    masks = [(dali.types.UINT8, 3, "HWC")] * len(config.masks)
    kinds, dimensions, layouts = zip(
        *inputs.values(), *masks, *(_draw_type(one) for one in draws), strict=True
    )

    def take() -> list[Any]:
        given = source()
        return [*(getattr(given, name) for name in inputs), *given.masks, *given.draws]

    nodes = list(
        dali.fn.external_source(
            source=take,
            num_outputs=len(kinds),
            batch=True,
            dtype=list(kinds),
            ndim=list(dimensions),
            layout=list(layouts),
            no_copy=True,
        )
    )
    first, last = len(inputs), len(inputs) + len(masks)
    return _Nodes(
        inputs=dict(zip(inputs, nodes, strict=False)),
        masks=nodes[first:last],
        draws={one.name: node for one, node in zip(draws, nodes[last:], strict=True)},
    )


def _begin_crops(
    config: StreamConfig, encoding: Encoding, nodes: _Nodes
) -> tuple[Any, Draw, Callable[[Any], Any]]:
    """Return what `_build_augmented` begins with: crops, draws, and what becomes of the crops."""
    masks = cut_masks(config, nodes.masks, **nodes.inputs)
    crops, finish = _split_graph(config, encoding, nodes.inputs)
    draw = Draw(lambda one: nodes.draws[one.name])
    return crops, draw, lambda made: (finish(made), *masks)


def _split_graph(
    config: StreamConfig, encoding: Encoding, inputs: dict[str, Any]
) -> tuple[Any, Callable[[Any], Any]]:
    """Return the crops of a graph, and what makes pixels of them; `inputs` as those of `_Nodes`."""
    rest = dict(inputs)
    where = {name: rest.pop(name, None) for name in ("images", "x", "y", "region")}
    return cut_crops(config, encoding, **where), partial(normalize_crops, config, **rest)


def _draw_type(draw: NamedDraw) -> _InputType:
    dtypes = {np.float32: dali.types.FLOAT, np.int32: dali.types.INT32, np.bool_: dali.types.BOOL}
    return dtypes[draw.dtype], int(draw.count > 0), ""


def list_draws(config: StreamConfig) -> list[NamedDraw]:
    """Return the draws that the augmentation of a config asks for, in its order.

    It is called once for this, in a graph that never runs.

    Raises:
        UsageError: it returns no image.
    """
    if config.augment is None:
        return []

    def make_node(one: NamedDraw) -> Any:
        dtype, dimensions, _ = _draw_type(one)
        return dali.fn.external_source(dtype=dtype, ndim=dimensions)

    draw = Draw(make_node)

    returned = []

    def begin() -> tuple[Any, Draw, Callable[[Any], Any]]:
        images = dali.fn.external_source(dtype=dali.types.UINT8, ndim=3, layout="HWC")

        def finish(made: Any) -> Any:
            returned.append(made)
            return images

        return (images.gpu() if config.on_gpu else images), draw, finish

    try:
        _build_augmented(config, begin)
    except Exception as error:  # of any kind: the function is the user's
        if _has_source(config):
            raise
        raise UsageError(
            f"augment {_name(config)}: its source cannot be read; define it in a .py file"
        ) from error
    if not isinstance(returned[0], dali.DataNode):
        raise UsageError(
            f"augment {_name(config)} returns {type(returned[0]).__name__}, no DALI node; "
            "it takes and returns images"
        )
    return [one for one, _ in draw.drawn.values()]


def _has_source(config: StreamConfig) -> bool:
    """Return whether DALI can read the source of the augmentation, as it must for an `if`."""
    try:
        inspect.getsource(config.augment)  # type: ignore[arg-type]  # TypeError is expected
    except (OSError, TypeError):
        return False
    return True


def _name(config: StreamConfig) -> str:
    return str(getattr(config.augment, "__qualname__", config.augment))


def _build_augmented(
    config: StreamConfig, begin: Callable[[], tuple[Any, Draw, Callable[[Any], Any]]]
) -> dali.Pipeline:
    """Return the pipeline of a graph with an augmentation, in which `if` acts on each sample.

    Args:
        config: with an augmentation.
        begin: makes the crops, the draws, and what becomes of the augmented crops.
    """
    augment = config.augment
    assert augment

    # DALI rewrites this function and all that it calls, for its `if`: ours need not be.
    @dali.pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def build() -> Any:
        crops, draw, finish = dali.do_not_convert(begin)()
        return dali.do_not_convert(finish)(augment(crops, draw))

    return build(**_pipeline_options(config))


def _check_shapes(config: StreamConfig, output: Any) -> None:
    """Refuse an augmentation that has changed the shape of an image.

    Raises:
        UsageError: names the augmentation and the two shapes.
    """
    height, width = config.image_size
    expected = [3, height, width] if config.layout == "NCHW" else [height, width, 3]
    for shape in output.shape():
        if list(shape) != expected:
            raise UsageError(
                f"augment {_name(config)} returns an image of {'x'.join(map(str, shape))} "
                f"({config.layout[1:]}), not {'x'.join(map(str, expected))}; "
                "resize or crop it to the size it came in"
            )
