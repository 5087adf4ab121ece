"""``MythosForCausalLM`` with the real transformers: what it gives is what a session gives, and nothing is ignored."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
    pipeline,
    set_seed,
)
from transformers.utils import logging

from mythos_edge.model.errors import BackendUnavailable, BundleError, UsageError
from mythos_edge.model.families.table import config_of
from mythos_edge.runtime.integrations.transformers import MythosForCausalLM
from mythos_edge.runtime.sampling import Sampler, SamplingParams
from mythos_edge.runtime.session import Session

PROMPT = "Return the "
# Of the byte-level model: the end of a text.
END = 256


@pytest.fixture
def model(text_bundle: Path) -> Iterator[MythosForCausalLM]:
    with MythosForCausalLM.from_pretrained(text_bundle) as opened:
        yield opened


@pytest.fixture
def session(text_bundle: Path) -> Iterator[Session]:
    with Session.open(text_bundle) as opened:
        yield opened


@pytest.fixture
def tokenizer(text_bundle: Path) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_file=str(text_bundle / "tokenizer.json"), padding_side="left")
    made.pad_token = made.eos_token = "<|endoftext|>"
    return made


def test_logits_depth_and_loss(model: MythosForCausalLM, session: Session) -> None:
    ids = torch.tensor([[82, 101, 116, 117], [84, 104, 101, 32]])
    output = model(ids, labels=ids)
    score = session.score(ids.numpy())
    assert output.logits.dtype == torch.float32
    assert np.array_equal(output.logits.numpy(), score.logits)
    assert np.array_equal(output.depth.numpy(), score.depth)
    expected = [
        -float(torch.log_softmax(torch.from_numpy(score.logits[row, column]), 0)[ids[row, column + 1]])
        for row in range(2)
        for column in range(3)
    ]
    assert float(output.loss) == pytest.approx(np.mean(expected), rel=1e-5)
    assert output[0] is output.loss
    shallow = model.forward(input_ids=ids, max_depth=1, policy="full")
    assert np.array_equal(shallow.logits.numpy(), session.score(ids.numpy(), max_depth=1, policy="full").logits)


def test_padding_changes_no_logits(model: MythosForCausalLM, session: Session) -> None:
    short, long = [82, 101, 116], [84, 104, 101, 32, 99]
    ids = torch.tensor([[END, END, *short], long, [*short, END, END]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    output = model(ids, attention_mask=mask)
    allowed = 1e-4  # a batch and one row may be summed in other orders
    for row, columns, prompt in ((0, slice(2, 5), short), (1, slice(0, 5), long), (2, slice(0, 3), short)):
        alone = session.score([prompt])
        assert np.abs(output.logits[row, columns].numpy() - alone.logits[0]).max() < allowed
        assert np.array_equal(output.depth[row, columns].numpy(), alone.depth[0])
    assert not output.logits[mask == 0].any()


def test_greedy_is_what_a_session_generates(
    model: MythosForCausalLM, session: Session, tokenizer: PreTrainedTokenizerFast
) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")  # with token_type_ids, which nobody asked for
    made = model.generate(**inputs, max_new_tokens=12)
    expected = session.generate(PROMPT, max_new_tokens=12)
    assert made.shape == (1, inputs["input_ids"].shape[1] + 12)
    assert made[0].tolist() == inputs["input_ids"][0].tolist() + expected.ids
    assert tokenizer.decode(made[0], skip_special_tokens=True) == PROMPT + str(expected.text)
    assert torch.equal(model.generate(inputs["input_ids"], max_length=made.shape[1]), made)
    assert torch.equal(model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=12)), made)
    assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 20  # as transformers
    shallow = model.generate(**inputs, max_new_tokens=5, max_depth=1, return_dict_in_generate=True)
    expected = session.generate(PROMPT, max_new_tokens=5, max_depth=1)
    assert shallow.sequences[0, -5:].tolist() == expected.ids
    assert shallow.depths.tolist() == [expected.depths]
    assert shallow.finish_reasons == ["length"]


def test_prompts_of_different_lengths_run_together(
    model: MythosForCausalLM, session: Session, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["Return", "The class of "]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    sampled: dict[str, Any] = {"temperature": 1.5, "top_k": 50, "max_new_tokens": 12}
    free = session.generate(texts, seeds=[5, 6], **sampled)
    stop = next(number for number in free[0].ids if number not in free[1].ids)
    made = model.generate(**inputs, **sampled, do_sample=True, seed=5, eos_token_id=stop, pad_token_id=END)
    start = inputs["input_ids"].shape[1]
    assert torch.equal(made[:, :start], inputs["input_ids"])
    both = session.generate(texts, seeds=[5, 6], stop_ids=(stop,), **sampled)
    assert len(both[0].ids) < len(both[1].ids) == made.shape[1] - start
    for row, one in enumerate(both):
        assert made[row, start:].tolist() == one.ids + [END] * (len(both[1].ids) - len(one.ids))
        assert one.ids == session.generate(texts[row], seed=5 + row, stop_ids=(stop,), **sampled).ids


def test_the_seed_of_torch_decides_and_rows_differ(model: MythosForCausalLM, session: Session) -> None:
    ids = torch.tensor([[82, 101, 116]])
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "pad_token_id": END}
    set_seed(7)
    first = model.generate(ids, num_return_sequences=3, **options)
    set_seed(7)
    assert torch.equal(model.generate(ids, num_return_sequences=3, **options), first)
    assert not torch.equal(model.generate(ids, num_return_sequences=3, **options), first)
    assert len({tuple(row) for row in first.tolist()}) == 3
    seeded = model.generate(ids, num_return_sequences=2, seed=5, **options)
    for row, seed in ((0, 5), (1, 6)):
        expected = session.generate(ids[0].tolist(), max_new_tokens=12, temperature=1.5, top_k=50, seed=seed).ids
        assert seeded[row, 3 : 3 + len(expected)].tolist() == expected


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"top_p": 0.6},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"repetition_penalty": 1.4, "temperature": 0.8},
    ],
)
def test_sampling_has_the_distribution_of_transformers(given: dict[str, Any], random: np.random.Generator) -> None:
    logits = random.normal(scale=3, size=97).astype(np.float32)
    history = [3, 5, 5, 96]
    makers = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    theirs = LogitsProcessorList([make(given[name]) for name, make in makers.items() if name in given])
    scores = theirs(torch.tensor([history]), torch.from_numpy(logits[None]))
    expected = torch.softmax(scores.double(), 1)[0].numpy()
    ours = Sampler(SamplingParams(**{"temperature": 1.0, **given})).distribution(logits, history)
    assert np.abs(ours - expected).max() < 1e-6  # theirs filter in float32


def test_a_streamer_gets_the_tokens_as_they_come(
    model: MythosForCausalLM, session: Session, tokenizer: PreTrainedTokenizerFast
) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 12})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == session.generate(PROMPT, max_new_tokens=12).text
    assert len(pieces) > 1


class _Recorder:
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_first_and_always_an_end(
    model: MythosForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = _Recorder()
    made = model.generate(torch.tensor([[82, 101]]), streamer=recorder, max_new_tokens=3)
    assert recorder.got == [[[82, 101]], *([number] for number in made[0, 2:].tolist())]
    assert recorder.ended == 1
    with pytest.raises(UsageError, match="a streamer takes one sequence, got 2"):
        model.generate(torch.tensor([[82], [101]]), streamer=recorder, pad_token_id=END)

    def fails(*_: object, **__: object) -> None:
        raise UsageError("no")

    monkeypatch.setattr(model.session, "stream", fails)
    with pytest.raises(UsageError, match="no"):
        model.generate(torch.tensor([[82, 101]]), streamer=recorder)
    assert recorder.ended == 2


def test_a_pipeline_generates(
    model: MythosForCausalLM,
    session: Session,
    tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    logging.enable_propagation()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (made,) = pipe(PROMPT, max_new_tokens=10, do_sample=False)
    expected = session.generate(PROMPT, max_new_tokens=10).text
    assert made["generated_text"] == PROMPT + str(expected)
    texts = ["Return", "The class of "]
    both = pipe(texts, max_new_tokens=6, do_sample=False, batch_size=2, return_full_text=False)
    for text, (one,) in zip(texts, both, strict=True):
        assert one["generated_text"] == session.generate(text, max_new_tokens=6).text
    set_seed(3)
    several = pipe(PROMPT, max_new_tokens=6, num_return_sequences=2, do_sample=True, temperature=1.5)
    assert len({one["generated_text"] for one in several}) == 2
    stop = str(expected)[0]
    stopped = pipe(PROMPT, max_new_tokens=10, do_sample=False, stop_sequence=stop, return_full_text=False)
    assert stopped[0]["generated_text"] == stop
    assert "not supported" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams is 4"),
        ({"use_cache": False}, "use_cache is False"),
        ({"output_scores": True}, "output_scores is True"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3"),
        ({"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])}, "logits_processor is a Logits"),
        ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "prefix_allowed_tokens_fn is a function"),
        ({"past_key_values": ((1,),)}, "past_key_values is a tuple"),
        ({"position_ids": torch.zeros(1, 2)}, "position_ids is a Tensor"),
        ({"token_type_ids": torch.ones(1, 2)}, "token_type_ids is a Tensor"),
        ({"maxnewtokens": 3}, "maxnewtokens is 3"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams is 2"),
        ({"temperature": 0.7}, "temperature is 0.7 without do_sample"),
        ({"top_k": 5}, "top_k is 5 without do_sample"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0 with do_sample"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2"),
        ({"max_new_tokens": 3, "max_length": 9}, "max_new_tokens is 3 and max_length is 9"),
        ({"max_length": 2}, "max_length is 2, but the prompts have 2 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many', expected a whole number"),
        ({"max_length": 9.5}, "max_length is 9.5, expected a whole number"),
        ({"num_return_sequences": "2"}, "num_return_sequences is '2', expected a whole number"),
        ({"eos_token_id": "</s>"}, "eos_token_id is an array of <U4, expected token ids"),
        ({"pad_token_id": 1.5}, "pad_token_id is 1.5, expected a whole number"),
        ({"do_sample": True, "seed": "x"}, "seed is 'x', expected a whole number"),
        ({"eos_token_id": 400}, "stop id 400 is out of range"),
        ({"attention_mask": torch.zeros(1, 2)}, "attention_mask hides all of row 0"),
        ({"attention_mask": torch.ones(2, 2)}, r"attention_mask has shape \(2, 2\), expected \(1, 2\)"),
        ({"input_ids": torch.ones(1, 2)}, "as input_ids, or as inputs"),
        ({"max_depth": 0}, "max_depth is 0"),
    ],
)
def test_what_a_session_cannot_do_is_refused_by_name(
    arguments: dict[str, Any], message: str, model: MythosForCausalLM
) -> None:
    with pytest.raises(UsageError, match=message):
        model.generate(torch.tensor([[82, 101]]), **arguments)


def test_arguments_that_ask_for_nothing_are_taken(model: MythosForCausalLM) -> None:
    ids = torch.tensor([[82, 101]])
    plain = model.generate(ids, max_new_tokens=3)
    nothing = {"num_beams": 1, "use_cache": True, "synced_gpus": False, "logits_processor": [], "length_penalty": 1.0}
    silent = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "bos_token_id": 1, "min_length": 0}
    assert torch.equal(model.generate(ids, max_new_tokens=3, **nothing, **silent, num_return_sequences=None), plain)


def test_padding_is_never_guessed(model: MythosForCausalLM) -> None:
    ids = torch.tensor([[0, 82], [84, 104]])
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    model.end_ids = ()
    with pytest.raises(UsageError, match="2 rows may end at different lengths: pass pad_token_id"):
        model.generate(ids, max_new_tokens=2)
    with pytest.raises(UsageError, match="pad_token_id 0 stands in input_ids: pass the attention_mask"):
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(UsageError, match="hides some in the middle of row 1"):
        model(torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]))
    made = model.generate(ids, max_new_tokens=2, pad_token_id=0, attention_mask=torch.tensor([[0, 1], [1, 1]]))
    assert torch.equal(made[:, :2], ids)


def test_forward_refuses_by_name_too(model: MythosForCausalLM) -> None:
    ids = torch.tensor([[82, 101]])
    for arguments, message in (
        ({"output_hidden_states": True}, "output_hidden_states is True"),
        ({"temperature": 0.5}, "temperature is 0.5"),
        ({"inputs_embeds": torch.ones(1, 2, 4)}, "inputs_embeds is a Tensor"),
        ({"max_depth": -1}, "max_depth is -1"),
    ):
        with pytest.raises(UsageError, match=message):
            model(ids, **arguments)
    with pytest.raises(UsageError, match="input_ids are missing"):
        model()
    with pytest.raises(UsageError, match="expected integers"):
        model(torch.ones(1, 2))


def test_the_end_of_the_context_is_told(model: MythosForCausalLM) -> None:
    longest = model.session.bundle.manifest.max_context
    ids = torch.full((1, longest), 82)
    with pytest.warns(UserWarning, match=f"longest context of {longest} tokens"):
        made = model.generate(ids, max_new_tokens=5, eos_token_id=[])
    assert made.shape[1] == longest + 1


def test_it_moves_nowhere_and_keeps_its_numbers(model: MythosForCausalLM) -> None:
    assert model.eval() is model
    assert model.can_generate()
    assert model.to("cpu") is model.to(torch.device("cpu")) is model
    assert model.device == torch.device("cpu")
    assert model.config.vocab_size == config_of(model.session.bundle.manifest).vocab_size
    with pytest.raises(UsageError, match=r"to torch\.float16: a bundle computes as its target does"):
        model.to(torch.float16)


def test_it_opens_targets_and_refuses_what_is_no_bundle(rounded_bundle: Path, tmp_path: Path) -> None:
    with MythosForCausalLM.from_pretrained(rounded_bundle, target="ort-cpu-int4", threads=1) as model:
        assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)
    for name, value in {"torch_dtype": torch.float16, "device_map": "cuda", "low_cpu_mem_usage": True}.items():
        with pytest.raises(UsageError, match=f"{name} is .*: a bundle's session cannot do this: leave it out"):
            MythosForCausalLM.from_pretrained(rounded_bundle, **{name: value})
    MythosForCausalLM.from_pretrained(rounded_bundle, torch_dtype="auto", device_map=None).session.close()
    with pytest.raises(BundleError, match="does not exist: make a bundle"):
        MythosForCausalLM.from_pretrained(tmp_path / "none")


def test_without_transformers_it_says_what_to_install(mla_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendUnavailable, match=r"transformers, which is not installed.*mythos-edge\[transformers\]"):
        MythosForCausalLM.from_pretrained(mla_bundle)
