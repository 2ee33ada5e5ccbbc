"""Runs launch/finetune.py on N ranks in processes of their own, and makes the small model and data that it needs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import re
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from grass_dist.finetune.run_folder import LOCK
from integration_tests.support.ranks import SERVER, free_port

ROOT = Path(__file__).parents[2]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven"]
AUTO = {"grass": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
"""Of a DeepSpeed JSON whose settings are those of the YAML file."""
WORDS = ["how", "many", "apples", "has", "ann", "bob", "plus", "is", *NUMBERS]


@dataclass(frozen=True)
class Ended:
    """How one rank's program ended."""

    code: int
    out: str
    err: str
    seconds: float


Watch = Callable[[int, str, list[int]], None]
"""Called with each line that a rank prints: (rank, line, process ids of all ranks)."""


def run_program(arguments: list[list[str]], timeout: float = 90, watch: Watch | None = None, cwd=None) -> list[Ended]:
    """One rank for each list of arguments; a rank that is not done in time is killed and fails the test.

    Args:
        cwd: working directory of each rank.
    """
    port, results = free_port(), SERVER.Queue()
    folders = cwd or [None] * len(arguments)
    processes = [
        SERVER.Process(target=_program, args=(rank, len(arguments), port, argv, results, folders[rank]), daemon=True)
        for rank, argv in enumerate(arguments)
    ]
    for process in processes:
        process.start()
    pids = [process.pid for process in processes]
    given: dict[int, Ended] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(given) < len(arguments):
            try:
                rank, told = results.get(timeout=0.5)
            except queue.Empty:
                assert time.monotonic() < deadline, f"ranks {set(range(len(arguments))) - set(given)} are not done"
                given |= _dead(processes, given)
                continue
            if isinstance(told, Ended):
                given[rank] = told
            elif watch is not None:
                watch(rank, told, pids)
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    return [given[rank] for rank in range(len(arguments))]


def _dead(processes: list, given: dict[int, Ended]) -> dict[int, Ended]:
    """Ranks that have ended without a word."""
    missing = [rank for rank in range(len(processes)) if rank not in given]
    return {rank: Ended(code, "", "", 0.0) for rank in missing if (code := processes[rank].exitcode) is not None}


class _Lines(io.StringIO):
    """Keeps what is written, and tells each line at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell, self._begun = tell, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._tell(line)
        return super().write(text)


def _program(rank: int, world_size: int, port: int, argv: list[str], results, cwd) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if cwd is not None:
        os.chdir(cwd)
    out, err = (_Lines(lambda line: results.put((rank, line))) for _ in range(2))
    code, began = 0, time.monotonic()
    sys.argv = ["finetune.py", *argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "launch" / "finetune.py"), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException as error:
            code = 70
            print(f"unexpected {type(error).__name__}: {error}", file=sys.stderr)
    results.put((rank, Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - began)))
    results.close()
    results.join_thread()
    os._exit(0)


def make_model(folder: Path, layers: int = 6) -> Path:
    """A small random Llama with a word tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary) + 1,  # an even number of rows, so that two ranks hold the same
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_data(file: Path, count: int = 40) -> Path:
    rows = []
    for i in range(count):
        a, b = i % 3, (i // 3) % 4
        question = f"ann has {NUMBERS[a]} apples plus {NUMBERS[b]} how many is"
        rows.append({"question": question, "answer": NUMBERS[(a + b) % 7]})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def make_config(folder: Path, model: Path, data: Path) -> Path:
    file = folder / "config.yaml"
    file.write_text(
        f"""
name: small
output_dir: {folder / "runs"}
answer_tokens: 4
model: {{name: {model}, dtype: float32}}
data: {{name: {data}, prompt: question, completion: answer, eval_examples: 8, max_length: 32}}
train: {{max_steps: 10, global_batch_size: 8, micro_batch_size: 2, learning_rate: 5e-3, eval_every: 5}}
grass: {{active_layers: 2, probe_steps: 2, sampling_interval: 2, update_interval: 4}}
parallel: fsdp2
"""
    )
    return file


def events(run: Path, kind: str) -> list[dict]:
    """Events of one kind in the metrics of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def tree_of(*folders: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of all files in folders, but of the lock that a start takes before it looks."""
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def run_all(config: Path, world_size: int, *overrides: str, timeout: float = 90) -> Path:
    """Runs it on ``world_size`` ranks, which must end well; gives the folder of the run."""
    ended = run_program([["--config", str(config), *overrides]] * world_size, timeout)
    assert [rank.code for rank in ended] == [0] * world_size, "\n".join(rank.err for rank in ended)
    assert not any(rank.out for rank in ended[1:])  # one rank speaks
    name = next((o.removeprefix("name=") for o in overrides if o.startswith("name=")), "small")
    return config.parent / "runs" / name


def check_refused(ended: list[Ended], message: str) -> None:
    """Every rank ended at once with status 1, and one of them said one sentence, which matches ``message``."""
    assert [rank.code for rank in ended] == [1] * len(ended), [rank.err for rank in ended]
    said = [line for rank in ended for line in rank.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and ended[0].err.count("error: ") == 1
    assert re.search(message, said[0]), said[0]
    assert "Traceback" not in ended[0].err + ended[1].err
    assert max(rank.seconds for rank in ended) < 45
