"""Every class of the mappings of transformers that people fine-tune, each tried in a process of its own."""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from integration_tests.support.model_trial import Outcome, try_class
from integration_tests.support.tiny_fixes import FIXES

_COMMON = (
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "MixtralForCausalLM",
    "Wav2Vec2ForCTC",
    "WhisperForConditionalGeneration",
    "SwinForImageClassification",
    "AutoModel",
)
LIMIT, CPU_LIMIT = 240.0, 40
"""Seconds for one class, and of them those of a CPU."""

KINDS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "masked": "MASKED_LM",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "image-classification": "IMAGE_CLASSIFICATION",
    "speech-seq2seq": "SPEECH_SEQ_2_SEQ",
    "ctc": "CTC",
    "audio-classification": "AUDIO_CLASSIFICATION",
    "image-text": "IMAGE_TEXT_TO_TEXT",
}


def every_class() -> Iterator[Outcome]:
    """Each class once, under the first kind that names it and the family whose name is most like its own."""
    from transformers.models.auto import modeling_auto

    seen: set[str] = set()
    for kind, mapping in KINDS.items():
        families: dict[str, list[str]] = {}
        for family, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                families.setdefault(name, []).append(family)
        for name, of in families.items():
            if name not in seen:
                seen.add(name)
                yield Outcome(kind, max(of, key=partial(_likeness, name)), name)


def _likeness(name: str, family: str) -> int:
    letters = zip(name.lower(), family.replace("-", "").replace("_", "").lower(), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], letters))


def sweep(chosen: Sequence[Outcome], processes: int = 1) -> list[Outcome]:
    """Tries each in a forked process, some at a time."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in _COMMON:
        getattr(transformers, name)  # imports what most classes share, before the forks
    waiting, running, done = list(chosen)[::-1], [], []
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(_start(waiting.pop()))
        time.sleep(0.02)
        for entry in list(running):
            outcome, process, answers, began = entry
            if answers.poll():
                try:
                    outcome = Outcome(**answers.recv())
                except EOFError:
                    process.join()
                    outcome.detail = f"its process ended with {process.exitcode}, which is SIGXCPU at -24 and -9"
            elif time.monotonic() - began > LIMIT:
                outcome.detail = f"took longer than {LIMIT:.0f} s"
            else:
                continue
            process.kill()
            process.join()
            running.remove(entry)
            done.append(outcome)
            print(
                f"{len(done)}/{len(chosen)} {outcome.kind} {outcome.name}: {outcome.verdict} {outcome.detail[:200]}",
                flush=True,
            )
    return done


def _start(outcome: Outcome) -> Any:
    context = mp.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_one, args=(outcome, there))
    process.start()
    there.close()
    return outcome, process, here, time.monotonic()


def _one(outcome: Outcome, answer: Any) -> None:
    import transformers

    os.setpgid(0, 0)
    signal.alarm(int(LIMIT) + 10)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        model_class = getattr(transformers, outcome.name)
        fixes = {**FIXES.get(outcome.family, {}), **FIXES.get(outcome.name, {})}
        try_class(outcome, model_class, fixes)
    except BaseException as error:
        outcome.detail += f"{type(error).__name__}: {error} {traceback.format_exc()[-300:]}"
    answer.send(asdict(outcome))
    answer.close()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", nargs="*", default=list(KINDS))
    parser.add_argument("--name", nargs="*")
    parser.add_argument("--verdict", nargs="*", help="those of --json that have one of these verdicts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    known = (
        [Outcome(**entry) for entry in json.loads(args.json.read_text())] if args.json and args.json.exists() else []
    )
    names = {o.name for o in known if o.verdict in args.verdict} if args.verdict else set(args.name or ())
    chosen = [o for o in every_class() if o.kind in args.kind and (not names or o.name in names)]
    done = sweep(chosen, args.processes)
    if args.json:
        fresh = {o.name: o for o in (*known, *done)}
        args.json.write_text(json.dumps([asdict(o) for o in fresh.values()], indent=1))


if __name__ == "__main__":
    main()
