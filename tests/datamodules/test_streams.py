"""Streams of files: every row once per epoch, with exact resuming from any position."""

import gzip
import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import pyarrow
import pyarrow.parquet
import pytest
import torch

from datamodules import TextData
from datamodules.shared.bad_samples import BadSampleError, BadSamples, TooManyBadSamplesError
from datamodules.text.data import HuggingFaceText
from diffmm.checks import DataError
from diffmm.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")
NUM_FILES, NUM_ROWS = 6, 23


def text(file: int, row: int) -> str:
    return f"<{file}.{row:02d}>" + "abcdefgh" * (row % 5)


@pytest.fixture(scope="module", params=["jsonl.gz", "parquet"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"), request.param)


def write_files(root: Path, kind: str) -> Path:
    root.mkdir(exist_ok=True)
    for file in range(NUM_FILES):
        rows = [{"text": text(file, row), "other": row} for row in range(NUM_ROWS)]
        path = root / f"{file}.{kind}"
        if kind == "parquet":
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, path, row_group_size=5)
        else:
            with gzip.open(path, "wt") as file_:
                file_.writelines(json.dumps(row) + "\n" for row in rows)
    return root


def source(root: Path, **changes: Any) -> HuggingFaceText:
    kind = "parquet" if any(root.glob("*.parquet")) else "json"
    arguments = {"data_files": str(root / "*.*"), "streaming": True, "shuffle_buffer": 10}
    return HuggingFaceText(kind, **{**arguments, **changes})


class Process(TextData):
    """The data of one of several processes, without starting them."""

    rank = 0
    world_size = 1


def data(root: Path, rank: int = 0, world_size: int = 1, **changes: Any) -> Process:
    arguments: dict[str, Any] = {
        "sequence_length": 24,
        "batch_size": 2,
        "validation_fraction": 0.0,
        "test_fraction": 0.0,
    }
    module = Process(source(root), **{**arguments, **changes})
    module.rank, module.world_size = rank, world_size  # type: ignore[misc]
    module.setup("fit")
    return module


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def merged(modules: list[Process]) -> dict[str, Any]:
    """The state that the processes would gather."""
    states = [module.state_dict() for module in modules]
    return {**states[0], "places": {k: v for state in states for k, v in state["places"].items()}}


def documents_in(batches: list[Any]) -> Counter[str]:
    texts = "".join(BYTES.decode(row) for batch in batches for row in batch["tokens"].tolist())
    return Counter(part[:4] for part in texts.split("<")[1:])


@pytest.mark.parametrize(
    ("packing", "num_workers", "taken"),
    [("packed", 0, 1), ("packed", 2, 7), ("padded", 0, 40), ("padded", 2, 7)],
)
def test_a_stream_goes_on_in_the_middle(
    files: Path, packing: str, num_workers: int, taken: int
) -> None:
    changes = {"packing": packing, "num_workers": num_workers, "objective": "masked"}
    whole = list(islice(data(files, **changes).train_dataloader(), 60))
    module = data(files, **changes)
    batches = iter(module.train_dataloader())
    assert same([next(batches) for _ in range(taken)], whole[:taken])
    state = module.state_dict()
    resumed = data(files, **changes)
    resumed.load_state_dict(state)
    assert same(list(islice(resumed.train_dataloader(), 60 - taken)), whole[taken:])


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_stream_may_stop_after_every_batch(files: Path, packing: str) -> None:
    changes = {"packing": packing, "sequence_length": 7}  # documents of several windows
    whole = list(islice(data(files, **changes).train_dataloader(), 30))
    module = data(files, **changes)
    pieces = []
    for _ in range(30):
        pieces.append(next(iter(module.train_dataloader())))
        module.load_state_dict(module.state_dict())
    assert same(pieces, whole)


def test_a_state_is_plain_and_small(files: Path, tmp_path: Path) -> None:
    module = data(files, num_workers=2)
    list(islice(module.train_dataloader(), 9))
    state = module.state_dict()
    torch.save(state, tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True) == state
    assert len(json.dumps(state)) < 2000


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_workers_change_nothing_where_they_divide_the_shares(files: Path) -> None:
    streams = [
        list(islice(data(files, stream_shares=4, num_workers=n).train_dataloader(), 40))
        for n in (0, 1, 2, 4)
    ]
    assert all(same(streams[0], other) for other in streams[1:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_share_what_one_alone_would_read(files: Path, num_workers: int) -> None:
    alone = list(islice(data(files, stream_shares=4).train_dataloader(), 40))
    for rank in range(2):
        module = data(files, rank, 2, stream_shares=4, num_workers=num_workers)
        assert same(list(islice(module.train_dataloader(), 20)), alone[rank::2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_processes_go_on_where_they_stopped(files: Path, num_workers: int) -> None:
    def processes() -> list[Process]:
        return [data(files, rank, 2, num_workers=num_workers) for rank in range(2)]

    whole = [list(islice(module.train_dataloader(), 30)) for module in processes()]
    stopped = processes()
    for module in stopped:
        list(islice(module.train_dataloader(), 11))
    state = merged(stopped)
    for rank, module in enumerate(processes()):
        module.load_state_dict(state)
        assert same(list(islice(module.train_dataloader(), 19)), whole[rank][11:])


def test_a_run_goes_on_with_another_number_of_processes(files: Path) -> None:
    """Two processes with batches of 2 become one with batches of 4, with and without workers."""

    def step(batches: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    two = [data(files, rank, 2, stream_shares=4) for rank in range(2)]
    shares = [list(islice(module.train_dataloader(), 9)) for module in two]
    state = merged(two)
    following = []
    for rank in range(2):
        module = data(files, rank, 2)
        module.load_state_dict(state)
        following.append(list(islice(module.train_dataloader(), 9)))
    expected = [step(batches) for batches in zip(*following, strict=True)]
    for num_workers in (0, 2):
        one = data(files, batch_size=4, num_workers=num_workers)
        one.load_state_dict(state)
        assert same(list(islice(one.train_dataloader(), 9)), expected)
        assert one.state_dict()["turn"] == 36
    assert not same(shares[0], following[0])


@pytest.mark.parametrize(("num_shares", "files_read"), [(1, 1), (4, 1), (6, 1), (8, 2), (13, 3)])
def test_every_row_comes_once_an_epoch(files: Path, num_shares: int, files_read: int) -> None:
    """Also if the files cannot be divided evenly among the shares, or there are more shares."""
    module = data(files, packing="padded", batch_size=1, stream_shares=num_shares)
    stream = module._training_stream(module.source)  # type: ignore[arg-type]
    size = NUM_FILES * files_read
    seen: Counter[str] = Counter()
    for share in range(num_shares):
        reader = stream._windows._shares(share=share, num_shares=num_shares)
        for row in islice(reader._rows(0, 0), 4 * NUM_FILES * NUM_ROWS):
            if share + row.part * num_shares >= size:
                break
            seen[row.text] += 1
    assert seen == Counter(text(f, r) for f in range(NUM_FILES) for r in range(NUM_ROWS))


def test_rows_are_shuffled_and_each_epoch_is_another(files: Path) -> None:
    module = data(files, packing="padded", batch_size=1, sequence_length=64)
    length = NUM_FILES * NUM_ROWS
    batches = list(islice(module.train_dataloader(), 5 * length))  # that many fill whole blocks
    assert set(documents_in(batches).values()) == {5}
    names = [BYTES.decode(batch["tokens"][0].tolist())[:6] for batch in batches]
    assert names[:length] != names[length : 2 * length]
    assert names[:10] != sorted(names[:10])
    indices = torch.cat([batch["index"] for batch in batches])
    assert indices.tolist() == list(range(5 * length))


class Watcher(lightning.pytorch.LightningModule):
    """Records batches without learning."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []
        self.states: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight * 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_train_batch_end(self, *_: Any) -> None:
        self.states.append(json.loads(json.dumps(self.trainer.datamodule.state_dict())))  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_takes_batches_one_by_one(files: Path, num_workers: int, tmp_path: Path) -> None:
    """It prefetches, validates in between, and its epochs are parts of one stream."""
    changes = {"num_workers": num_workers, "validation_fraction": 0.2}
    whole = list(islice(data(files, **changes).train_dataloader(), 21))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=3,
        limit_train_batches=7,
        limit_val_batches=2,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )
    watcher = Watcher()
    trainer.fit(watcher, datamodule=data(files, **changes))
    assert same(watcher.seen, whole)
    assert [state["turn"] for state in watcher.states] == list(range(1, 22))
    module = data(files, **changes)
    state = watcher.states[9]
    module.load_state_dict({**state, "places": {int(k): v for k, v in state["places"].items()}})
    assert same(list(islice(module.train_dataloader(), 11)), whole[10:])


def test_evaluation_does_not_depend_on_who_shares_it(files: Path) -> None:
    def windows(num_workers: int, world_size: int) -> dict[int, list[int]]:
        """All samples of all processes, by their index."""
        found = {}
        for rank in range(world_size):
            changes = {"validation_fraction": 0.3, "num_workers": num_workers}
            for batch in data(files, rank, world_size, **changes).val_dataloader():
                for index, tokens in zip(batch["index"].tolist(), batch["tokens"], strict=True):
                    assert index not in found
                    found[index] = tokens.tolist()
        return found

    whole = windows(0, 1)
    assert len(whole) > 10
    for num_workers, world_size in ((2, 1), (0, 2), (0, 4), (2, 2)):
        assert windows(num_workers, world_size) == whole


def test_a_split_of_a_stream_without_a_document_is_refused(files: Path) -> None:
    with pytest.raises(DataError, match="this split contains no document of the stream; use more"):
        list(data(files, validation_fraction=1e-9).val_dataloader())


def test_what_does_not_fit_is_refused(files: Path) -> None:
    module = data(files, stream_shares=4)
    list(islice(module.train_dataloader(), 3))
    state = module.state_dict()

    def resume(*process: int, **changes: Any) -> None:
        other = data(files, *process, **changes)
        other.load_state_dict(state)
        other.train_dataloader()

    with pytest.raises(ValueError, match=r"the stream had seed=0 and now has seed=1: resume"):
        resume(seed=1)
    with pytest.raises(ValueError, match=r"the global batch size was 2 samples and is now 4"):
        resume(0, 2)
    with pytest.raises(ValueError, match=r"2 samples per turn, which do not divide a batch of 1"):
        resume(0, 2, batch_size=1)
    with pytest.raises(ValueError, match=r"4 shares cannot be read by 1 process.* num_workers=3"):
        resume(num_workers=3)
    with pytest.raises(ValueError, match=r"a stream of 3 shares.*num_workers=2.*must divide 3"):
        data(files, stream_shares=3, num_workers=2).train_dataloader()
    with pytest.raises(ValueError, match="stream_shares must be at least 1, got 0"):
        data(files, stream_shares=0)


# ------------------------------------------------------------------ broken files


@pytest.fixture(params=["jsonl.gz", "parquet", "bytes"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Six files, of which number 2 cannot be read."""
    kind = request.param
    root = write_files(tmp_path / "files", "parquet" if kind == "parquet" else "jsonl.gz")
    path = next(root.glob("2.*"))
    content = path.read_bytes()
    if kind == "bytes":
        with gzip.open(path, "wb") as file:
            file.write(b'{"text": "\xff\xfe", "other": 1}\n')
    else:
        path.write_bytes(content[: len(content) // 2])
    return path


LENIENT = BadSamples("substitute", max_bad_fraction=0.5)


def test_a_broken_file_stops_the_stream_by_default(broken: Path) -> None:
    loader = data(broken.parent, sequence_length=64).train_dataloader()
    with pytest.raises(BadSampleError, match=rf"shard 2 \({broken}\) cannot be read from row 0"):
        list(islice(loader, 200))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_without_a_broken_file(
    broken: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"packing": "padded", "num_workers": num_workers, "bad_samples": LENIENT}
    with caplog.at_level(logging.WARNING, "datamodules"):
        whole = list(islice(data(broken.parent, **changes).train_dataloader(), 150))
    if num_workers == 0:
        mine = [record for record in caplog.records if record.name.startswith("datamodules")]
        (message,) = [record.getMessage() for record in mine]
        assert message.startswith(f"shard 2 ({broken}) cannot be read from row 0 onward: ")
        assert message.endswith("; continuing with another file")
    seen = documents_in(whole)
    assert not any(name.startswith("2.") for name in seen)
    assert {name[0] for name in seen} == set("01345")
    module = data(broken.parent, **changes)
    list(islice(module.train_dataloader(), 61))
    resumed = data(broken.parent, **changes)
    resumed.load_state_dict(module.state_dict())
    assert same(list(islice(resumed.train_dataloader(), 89)), whole[61:])


def test_a_first_file_that_cannot_be_opened_is_passed_over(tmp_path: Path) -> None:
    root = write_files(tmp_path / "files", "jsonl.gz")
    (root / "0.jsonl.gz").write_bytes(b"")
    (root / "1.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="the datasets library cannot load"):
        data(root)
    module = data(root, packing="padded", bad_samples=LENIENT)
    seen = documents_in(list(islice(module.train_dataloader(), 150)))
    assert {name[0] for name in seen} == set("2345")


def test_quarantine_leaves_a_file_out_and_changes_no_run_that_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The first rows of number 3 can be read, up to its second chunk.
    root = write_files(tmp_path / "files", "parquet")
    path = root / "3.parquet"
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 80] = b"\xff" * 80
    path.write_bytes(content)
    listed = tmp_path / "bad.txt"
    changes = {
        "packing": "padded",
        "batch_size": 1,
        "bad_samples": BadSamples("quarantine", 0.5, str(listed)),
    }
    module = data(root, **changes)
    batches = iter(module.train_dataloader())
    start = [next(batches)]
    while not listed.exists():
        state = module.state_dict()
        start.append(next(batches))
    following = start[-1:] + list(islice(batches, 20))
    assert listed.read_text() == f"{path}\n"
    # The resumed run is unchanged, although the list now contains the file.
    resumed = data(root, **changes)
    resumed.load_state_dict(state)
    assert same(list(islice(resumed.train_dataloader(), 21)), following)
    # A new run does not open it.
    caplog.clear()
    seen = documents_in(list(islice(data(root, **changes).train_dataloader(), 150)))
    assert not any(name.startswith("3.") for name in seen)
    assert not caplog.records


def test_a_stream_of_nothing_ends(tmp_path: Path) -> None:
    root = write_files(tmp_path / "files", "jsonl.gz")
    for path in root.iterdir():
        with gzip.open(path, "wt") as file:
            file.write(json.dumps({"text": ""}) + "\n")
    with pytest.raises(ValueError, match=r"the stream has no document of the split in 6 parts"):
        next(iter(data(root).train_dataloader()))
    for path in sorted(root.iterdir())[1:]:
        path.write_bytes(b"junk")
    strict = BadSamples("substitute", max_bad_fraction=0.03)
    with pytest.raises(TooManyBadSamplesError, match=r"4 of \d samples read by this process"):
        next(iter(data(root, bad_samples=strict).train_dataloader()))


# ------------------------------------------------------------------ two real processes


def _take_and_tell(rank: int, rendezvous: str, root: str, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    module = data(Path(root), rank, 2, stream_shares=4)
    list(islice(module.train_dataloader(), 5))
    queue.put((rank, module.state_dict()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_gather_one_state(tmp_path: Path) -> None:
    root = write_files(tmp_path / "files", "jsonl.gz")
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(
            target=_take_and_tell, args=(rank, str(tmp_path / "meet"), str(root), queue)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    states = dict(queue.get(timeout=90) for _ in processes)
    for process in processes:
        process.join(30)
    alone = data(root, stream_shares=4)
    list(islice(alone.train_dataloader(), 10))
    assert states[0] == states[1]
    expected = {**alone.state_dict(), "global_batch_size": 4}
    assert states[0] == expected
