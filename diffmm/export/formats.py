"""The formats that a trained model is exported to, and their files."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diffmm.checks import article, check_choice
from diffmm.export.metadata import metadata_of
from diffmm.export.onnx_file import write_onnx
from diffmm.export.parts import signatures_of
from diffmm.export.program import TOLERANCE, Call, largest_difference, write_aoti, write_pt2
from diffmm.export.quantized import is_quantized, save_quantized
from diffmm.export.signature import Signature
from diffmm.interop.conversion import FAMILIES, check_free, write_model
from diffmm.models.description import unwrap
from diffmm.models.job import Job
from diffmm.models.modes import check_evaluation
from diffmm.models.safetensors_files import WEIGHTS_NAME
from diffmm.models.weights import save_model
from diffmm.new_folders import workspace

HUGGING_FACE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "diffllama",
    "audio-spectrogram-transformer",
    "whisper",
)
"""Families of `diffmm.interop` that `transformers` loads, in the order in which they are tried."""


@dataclass(frozen=True)
class Format:
    """A format of exported models.

    Attributes:
        file_name: Name of the file in a folder; None if the export is a folder.
        write: Takes a model, the new file (or folder) and whether decoders have a cache; writes it
            and returns a line about it.
        has_cache: Whether `cache` makes a difference.
        has_device: Whether it is for the kind of device that the model is on.
        can_quantize: Whether it can hold the models of `diffmm.export.quantized.quantize`.
    """

    file_name: str | None
    write: Callable[[nn.Module, Path, bool], str]
    has_cache: bool = True
    has_device: bool = False
    can_quantize: bool = False


def export(
    model: nn.Module, target: str | Path, to: str, *, cache: bool = True
) -> tuple[Path, str]:
    """Export a model, whole or not at all.

    Args:
        model: A model of `diffmm.models`, in evaluation mode, on the CPU, or for `"pt2"` and
            `"aoti"` on the device on which the program is to run; or one that
            `diffmm.export.quantized.quantize` returned.
        target: A file with the ending of the format, or a folder for it, which is created. Nothing
            is overwritten.
        to: A name in `FORMATS`.
        cache: Whether the program of a decoder takes and returns its keys and values.

    Returns:
        The file (or the folder, for `"hf"` and for a model of several programs, which are files in
        it such as `model_image.onnx`), and a line that says what it is.

    Raises:
        ValueError: If the format is unknown, the model is in training mode, the target exists or
            has the ending of another format, a package is missing, or the format cannot hold the
            model.
    """
    check_choice("to", to, FORMATS)
    check_evaluation(model, "exporting it")
    form = FORMATS[to]
    path = path_of(Path(target), to)
    if not cache and not form.has_cache:
        raise ValueError(f"cache=False is for programs, and {to} has weights only: leave it out")
    if is_quantized(model) and not form.can_quantize:
        able = ", ".join(name for name, each in FORMATS.items() if each.can_quantize)
        raise ValueError(f"the format {to} cannot hold quantized weights: use {able}")
    with appearing(path) as unfinished:
        line = form.write(unwrap(model), unfinished, cache)
    return (path if path.exists() else path.parent), line


def path_of(target: Path, to: str) -> Path:
    """The file (or, for `"hf"`, the folder) that an export to `target` writes.

    Raises:
        ValueError: If it exists, or the target has the ending of another format.
    """
    name = FORMATS[to].file_name
    endings = {Path(form.file_name).suffix for form in FORMATS.values() if form.file_name}
    own = None if name is None else Path(name).suffix
    if target.suffix in endings and target.suffix != own:
        wanted = "a folder" if own is None else f"a name that ends in {own}, or a folder"
        raise ValueError(f"{target} ends in {target.suffix}, but the format {to} writes {wanted}")
    path = target if name is None or target.suffix == own else target / name
    if path.suffix == own and path.exists():
        raise ValueError(f"{path} exists already: give another target, or remove it")
    check_free(path)
    if path.parent.is_file():
        raise ValueError(f"{path.parent} is a file, not a folder: give another target")
    return path


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a new folder beside `path`; at the end of the `with`
    statement everything in that folder is moved to the place of `path`, unless there is an
    error."""
    with workspace(path) as folder:
        yield folder / path.name
        # The file itself comes last: where it is, everything is.
        found = sorted(folder.iterdir(), key=lambda each: each.name == path.name)
        for each in found:
            check_free(path.with_name(each.name))
        for each in found:
            each.replace(path.with_name(each.name))


def _checked(signature: Signature, program: Call) -> str:
    """A line about a program, whose outputs are those of its model.

    Raises:
        ValueError: If they are not.
    """
    difference = largest_difference(signature, program)
    if not difference <= TOLERANCE:  # also for NaN
        raise ValueError(
            f"the outputs of the program differ from the model's by {difference:.1e} of the "
            f"largest one, more than {TOLERANCE:.0e}: nothing was written"
        )
    names = ", ".join(port.name for port in signature.inputs[:3])
    more = f" and {len(signature.inputs) - 3} more" if len(signature.inputs) > 3 else ""
    return (
        f"inputs {names}{more}; largest difference of the outputs on random inputs: "
        f"{difference:.1e} of the largest"
    )


def writer_of_programs(
    write: Callable[[Signature, Path, Mapping[str, Any]], Call],
) -> Callable[[nn.Module, Path, bool], str]:
    """Write the programs of a model with `write`, and compare their results with the model's. If
    there are several, the names of their files end with those of the parts."""

    def written(model: nn.Module, file: Path, cache: bool) -> str:
        job: Any = getattr(model, "job", None) or Job()
        lines = []
        for part, signature in signatures_of(model, cache=cache).items():
            own = file.with_stem(f"{file.stem}_{part}") if part else file
            line = _checked(signature, write(signature, own, metadata_of(model, signature, job)))
            lines.append(f"{own.name}: {line}" if part else line)
        return "; ".join(lines)

    return written


def _write_safetensors(model: nn.Module, file: Path, cache: bool) -> str:
    (save_quantized if is_quantized(model) else save_model)(model, file)
    count = sum(p.numel() for p in model.parameters())
    return f"{count:,} parameters, {file.stat().st_size:,} bytes, read by diffmm.load"


def _write_hugging_face(model: nn.Module, folder: Path, cache: bool) -> str:
    reasons = []
    for name in HUGGING_FACE:
        if FAMILIES[name].model is not type(model):
            continue
        try:
            write_model(model, folder, name)
            return f"a model of type {name}, read by transformers"
        except ValueError as error:
            reasons.append(str(error))
    if not reasons:
        kind = article(type(model).__name__)
        reasons = [f"transformers has no class for {kind}: see diffmm convert for other libraries"]
    raise ValueError("; ".join(reasons))


FORMATS = {
    "onnx": Format("model.onnx", writer_of_programs(write_onnx)),
    "pt2": Format("model.pt2", writer_of_programs(write_pt2), has_device=True),
    "aoti": Format("model.pt2", writer_of_programs(write_aoti), has_device=True),
    "safetensors": Format(WEIGHTS_NAME, _write_safetensors, has_cache=False, can_quantize=True),
    "hf": Format(None, _write_hugging_face, has_cache=False),
}
"""All formats by name: ONNX, a program of `torch.export`, machine code of AOTInductor, weights for
`diffmm.load`, and a folder for Hugging Face `transformers`."""
