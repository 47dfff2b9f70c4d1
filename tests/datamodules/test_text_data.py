"""TextData: splits, loaders, caches and errors."""

import json
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from datamodules import TextData
from datamodules.text.data import (
    HuggingFaceText,
    StandardLibrary,
    TextFolder,
    TokenFiles,
    write_token_file,
)
from datamodules.text.sources import Corpus, TextSource
from diffmm.batch import IGNORE_INDEX, TextBatch
from diffmm.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for number in range(60):
        (root / f"{number:02d}.txt").write_text(f"<{number:02d}>" + "lorem ipsum " * (number % 7))
    return root


def data(source: Corpus | Path, **changes: Any) -> TextData:
    if isinstance(source, Path):
        source = TextFolder(str(source))
    small: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "validation_fraction": 0.3}
    module = TextData(source, **{**small, **changes})
    module.prepare_data()
    module.setup()
    return module


def documents_in(loader: Any) -> set[str]:
    """The documents in a loader's tokens, by the name that each begins with."""
    text = "".join(BYTES.decode(row) for batch in loader for row in batch["tokens"].tolist())
    return {part[:2] for part in text.split("<")[1:]}


def equal(left: list[TextBatch], right: list[TextBatch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)  # type: ignore[literal-required]
        for a, b in zip(left, right, strict=True)
    )


def test_the_default_needs_nothing() -> None:
    module = TextData(sequence_length=128)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["tokens"].shape == batch["targets"].shape == batch["document_ids"].shape
    assert batch["tokens"].shape == (16, 128)
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert batch["num_bytes"].shape == batch["index"].shape == (16,)
    # Where nothing is masked, the target is the next token.
    shifted, targets = batch["tokens"][:, 1:], batch["targets"][:, :-1]
    known = targets != IGNORE_INDEX
    assert torch.equal(shifted[known], targets[known])
    assert isinstance(module.source, StandardLibrary)


def test_splits_share_no_document(folder: Path) -> None:
    module = data(folder, test_fraction=0.2, packing="padded", batch_size=1)
    splits = [
        documents_in(loader)
        for loader in (
            module.train_dataloader(),
            module.val_dataloader(),
            module.test_dataloader(),
        )
    ]
    assert all(splits)
    assert sum(map(len, splits)) == len(set.union(*splits)) == 60
    # Another seed holds out the same documents.
    other = data(folder, test_fraction=0.2, packing="padded", batch_size=1, seed=5)
    assert documents_in(other.val_dataloader()) == splits[1]


def test_a_split_of_its_own_source_is_all_of_it(folder: Path) -> None:
    first, rest = TextFolder(str(folder), "[0-2]*.txt"), TextFolder(str(folder), "[3-5]*.txt")
    module = data(first, validation_source=rest, test_fraction=0, packing="padded", batch_size=1)
    assert len(documents_in(module.train_dataloader())) == 30
    assert documents_in(module.val_dataloader()) == {f"{number}" for number in range(30, 60)}
    assert module.test_dataloader() == []


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_workers_change_nothing(folder: Path, objective: Any, packing: Any) -> None:
    batches = []
    for num_workers in (0, 2):
        module = data(folder, objective=objective, packing=packing, num_workers=num_workers)
        train = module.train_dataloader()
        train.sampler.set_epoch(3)  # type: ignore[attr-defined]
        batches.append([*train, *module.val_dataloader()])
    assert equal(*batches)


def test_training_changes_with_the_epoch_and_validation_does_not(folder: Path) -> None:
    module = data(folder, objective="masked")
    train, validation = module.train_dataloader(), module.val_dataloader()
    assert isinstance(validation, torch.utils.data.DataLoader)
    before = list(train), list(validation)
    for loader in (train, validation):
        loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert not equal(before[0], list(train))
    assert equal(before[1], list(validation))


def test_a_cache_is_made_once_and_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = list(data(folder).train_dataloader())
    cached = list(data(folder, cache_dir=str(tmp_path)).train_dataloader())
    assert equal(direct, cached)
    (header,) = tmp_path.glob("*.json")

    def never(self: TextSource) -> Any:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(TextFolder, "documents", never)
    assert equal(direct, list(data(folder, cache_dir=str(tmp_path)).train_dataloader()))
    header.unlink()
    with pytest.raises(AssertionError, match="tokenized again"):
        data(folder, cache_dir=str(tmp_path))


def test_token_files_give_what_their_source_gives(folder: Path, tmp_path: Path) -> None:
    source = TextFolder(str(folder))
    path = write_token_file(tmp_path / "texts.bin", source.documents(), BYTES)
    from_files = data(TokenFiles([str(path)]), num_workers=2)
    assert equal(list(data(source).train_dataloader()), list(from_files.train_dataloader()))


def test_a_tokenizer_file(folder: Path, tmp_path: Path) -> None:
    words = ["[UNK]", "[SEP]", "lorem", "ipsum", "<", ">", *(f"{n:02d}" for n in range(60))]
    inner = tokenizers.Tokenizer(
        models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    path = str(tmp_path / "tokenizer.json")
    inner.save(path)
    module = data(folder, tokenizer=path, vocab_size=66)
    batch = next(iter(module.val_dataloader()))
    assert batch["tokens"].max() < 66
    assert (batch["tokens"] == 1).any()
    with pytest.raises(
        ValueError, match="has 66 tokens, which exceeds the model's vocab_size of 65"
    ):
        data(folder, tokenizer=path, vocab_size=65)
    with pytest.raises(ValueError, match=r"tokenizer\.json' has no mask token"):
        data(folder, tokenizer=path, objective="masked")


# ------------------------------------------------------------------ streams


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceText:
    root = tmp_path_factory.mktemp("stream")
    for number in range(2):
        rows = [json.dumps({"text": f"<{number}{row}> and more text"}) for row in range(10)]
        (root / f"{number}.jsonl").write_text("\n".join(rows))
    files = str(root / "*.jsonl")
    return HuggingFaceText("json", data_files=files, streaming=True, shuffle_buffer=10)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("num_workers", [0, 3])  # also more shares than files
def test_a_stream_is_endless_in_training_and_whole_in_validation(
    stream: HuggingFaceText, num_workers: int
) -> None:
    module = data(
        stream, packing="padded", sequence_length=64, num_workers=num_workers, test_fraction=0.2
    )
    validation = documents_in(module.val_dataloader())
    test = documents_in(module.test_dataloader())
    assert validation
    assert test
    batches = iter(module.train_dataloader())
    training = [next(batches) for _ in range(30)]
    seen = documents_in(training)
    assert len(seen) + len(validation) + len(test) == 20
    assert seen.isdisjoint(validation | test)
    assert validation.isdisjoint(test)
    indices = torch.cat([batch["index"] for batch in training])
    assert len(indices.unique()) == len(indices)


def test_processes_share_a_stream(stream: HuggingFaceText, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    monkeypatch.setattr(TextData, "world_size", 2)
    for rank in range(2):
        monkeypatch.setattr(TextData, "rank", rank)
        module = data(stream, packing="padded", batch_size=1, validation_fraction=0.9)
        shares.append(documents_in(module.val_dataloader()))
    assert all(shares)
    assert shares[0].isdisjoint(shares[1])


def test_a_stream_needs_a_horizon(stream: HuggingFaceText, tmp_path: Path) -> None:
    module = data(stream)
    module.trainer = lightning.Trainer(logger=False, accelerator="cpu", max_epochs=1)
    with pytest.raises(ValueError, match=r"endless: set --trainer\.max_steps"):
        module.train_dataloader()
    with pytest.raises(
        ValueError, match=r"cache_dir stores tokenized text, but \S*jsonl is streamed"
    ):
        data(stream, cache_dir=str(tmp_path))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"mask_probability": 0.0}, r"mask_probability must be in \(0, 1\), got 0.0"),
        ({"packing": "paked"}, "packing must be one of .*'paked'; did you mean 'packed'"),
        ({"objective": "casual"}, "objective must be one of .*did you mean 'causal'"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, r"sum below 1, got 0\.6 and 0\.4"),
        ({"test_fraction": -0.1}, "must be at least 0.*-0.1"),
        (
            {"vocab_size": 258},
            "'bytes' has 259 tokens, which exceeds the model's vocab_size of 258",
        ),
    ],
)
def test_arguments_out_of_range(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(folder, **changes)


def test_a_split_without_documents(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(
        ValueError, match=r"one\.txt.* has 1 document.*separator.*split_by: position.*_source"
    ):
        data(TextFolder(str(tmp_path), "one.txt"), validation_fraction=0.0001)
    (tmp_path / "one.txt").write_text("")
    with pytest.raises(ValueError, match="has 0 documents with text"):
        data(TextFolder(str(tmp_path)))


def text_of(loaders: Any) -> str:
    """All tokens that the loaders' samples predict, in order, and the token before them."""
    samples = [sample for loader in loaders for sample in loader.dataset]
    ids = [sample["targets"][sample["targets"] != IGNORE_INDEX] for sample in samples]
    return BYTES.decode(samples[0]["tokens"][:1].tolist() + torch.cat(ids).tolist())


@pytest.mark.parametrize("fractions", [(0.1, 0.2), (0.25, 0.0), (0.0, 0.3), (0.1, 0.05)])
def test_a_single_file_is_split_by_position(tmp_path: Path, fractions: tuple[float, float]) -> None:
    text = "".join(f"{number:04d} " for number in range(200))  # and the end of text: 1001 tokens
    (tmp_path / "one.txt").write_text(text)
    validation, test = fractions
    module = data(
        TextFolder(str(tmp_path)),
        split_by="position",
        validation_fraction=validation,
        test_fraction=test,
    )
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    borders = [0, round((1 - validation - test) * 1001), round((1 - test) * 1001), 1001]
    for loader, begin, end in zip(loaders, borders[:-1], borders[1:], strict=True):
        if begin == end:
            assert loader == []
        else:
            assert text_of([loader]) == text[begin:end]


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_few_files_are_split_by_position(tmp_path: Path, packing: Any) -> None:
    words = ("alpha " * 9, "beta " * 3, "gamma " * 20, "delta " * 2)
    for number, word in enumerate(words):
        (tmp_path / f"{number}.txt").write_text(word)
    module = data(
        TextFolder(str(tmp_path)),
        split_by="position",
        packing=packing,
        validation_fraction=0.2,
        test_fraction=0.2,
        document_mask=False,
    )
    splits = [module._dataset(split)._documents for split in ("training", "validation", "test")]  # type: ignore[arg-type, union-attr]
    whole = [[*word.encode(), BYTES.eos_id] for word in words]
    parts: dict[int, list[int]] = {}
    for documents in splits:
        for number in range(len(documents)):
            ids = documents.read(number, 0, int(documents.lengths[number]))
            parts.setdefault(int(documents.keys[number]), []).extend(ids.tolist())
    assert list(parts.values()) == whole
    total = sum(map(len, whole))
    sizes = [int(documents.lengths.sum()) for documents in splits]
    assert sizes == [
        round(0.6 * total),
        round(0.8 * total) - round(0.6 * total),
        total - round(0.8 * total),
    ]
    assert len(module.val_dataloader()) > 0
    assert len(module.test_dataloader()) > 0


def test_what_cannot_be_split_by_position_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 9)
    with pytest.raises(ValueError, match="the validation split is empty: .*has 1 document"):
        data(
            TextFolder(str(tmp_path)),
            split_by="position",
            validation_fraction=0.1,
            test_fraction=0.0,
        )
    with pytest.raises(ValueError, match="split_by must be one of 'key', 'position', got 'place'"):
        TextData(split_by="place")  # type: ignore[arg-type]
    stream = HuggingFaceText("json", data_files="a.json", streaming=True)
    with pytest.raises(ValueError, match="split_by position needs all tokens, but .* is streamed"):
        TextData(stream, split_by="position")


# ------------------------------------------------------------------ Lightning and the command line


class Reader(lightning.LightningModule):
    """Records its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []
        self.num_validated = 0

    def training_step(self, batch: TextBatch, batch_index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch: TextBatch, batch_index: int) -> None:
        self.num_validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("validation_fraction", [0.0, 0.3])
def test_lightning_advances_the_epoch(folder: Path, validation_fraction: float) -> None:
    module, reader = data(folder, validation_fraction=validation_fraction), Reader()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(reader, datamodule=module)
    epochs = [[i for of, row in reader.seen if of == epoch for i in row] for epoch in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == len(set(epochs[0]))
    assert epochs[0] != epochs[1]
    assert bool(reader.num_validated) == bool(validation_fraction)


def test_a_recipe_names_its_sources(folder: Path) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(lightning.LightningDataModule, "data")
    source = {"class_path": "datamodules.text.TextFolder", "init_args": {"root": str(folder)}}
    recipe = {
        "class_path": "datamodules.TextData",
        "init_args": {"source": source, "batch_size": 2, "objective": "masked"},
    }
    built = parser.instantiate(parser.parse_object({"data": recipe})).data
    assert isinstance(built, TextData)
    assert isinstance(built.source, TextFolder)
    assert built.source.root == str(folder)
    assert built.objective == "masked"
