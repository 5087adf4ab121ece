"""A bundle behind the face of a causal language model of transformers: ``generate``, ``forward``, ``pipeline``.

    model = MythosForCausalLM.from_pretrained("model.bundle")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file="model.bundle/tokenizer.json")
    model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=50, do_sample=True)
    pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon")

A session does the work, with its caches and its exact dynamic depth: no loop of transformers runs over ``forward``.
What a session cannot do is refused by name. torch and transformers are imported when a model is made.

Not here: training, other devices (the bundle's target decides), and saving.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.runtime.decoding import Generation
from mythos_edge.runtime.prompts import checked_ids
from mythos_edge.runtime.request_values import Within, flag, texts, token_ids, whole
from mythos_edge.runtime.session import Session

if TYPE_CHECKING:
    import torch

Int64 = NDArray[np.int64]
# Options of a session that mean the same here: how deep it thinks, and how it is run.
_DEPTH = ("policy", "max_depth", "min_depth", "threshold")
_RUN = ("chunk", "max_lag", "draft_depth", "draft_tokens")
# How transformers samples where nothing is said, and what says nothing where it does not sample.
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_NOT_SAMPLING = {"temperature": (0, 1), "top_k": (0, 50), "top_p": (1,), "min_p": (0,)}
_TOKEN_ID = Within(least=0)
_NEW_TOKENS = 20
# Values with which arguments that are not known here ask for nothing; 0, False and nothing do so for all others.
_NEUTRAL = {
    "use_cache": True,
    "num_beams": 1,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "return_dict": True,
    "torch_dtype": "auto",
    "dtype": "auto",
    "device_map": "cpu",
}
# They say nothing about what follows a prompt.
_OF_FILES = ("bos_token_id", "transformers_version")


@dataclass(frozen=True)
class _Request:
    """A call of ``generate`` in the words of a session; ``seed`` is None where the rows are not sampled."""

    options: dict[str, Any]
    rows_a_prompt: int
    pad: int | None
    seed: int | None
    as_dict: bool


class MythosForCausalLM:
    """A session with the methods of a transformers model. Raises BackendUnavailable without torch and transformers."""

    main_input_name = "input_ids"

    def __init__(self, session: Session) -> None:
        torch, transformers = _libraries()
        self.session = session
        manifest = session.bundle.manifest
        self.config = transformers.PretrainedConfig(
            **manifest.config, architectures=[type(self).__name__], name_or_path=str(session.bundle.path)
        )
        self.end_ids = tuple(token.id for token in manifest.end_tokens)
        self.generation_config = transformers.GenerationConfig(
            eos_token_id=list(self.end_ids) or None, pad_token_id=self.end_ids[0] if self.end_ids else None
        )
        self.device, self.dtype = torch.device("cpu"), torch.float32
        # A pipeline knows the models that it takes by the names in this table.
        transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mythos_edge"] = type(self).__name__

    @classmethod
    def from_pretrained(
        cls,
        bundle: Path | str,
        *,
        target: str | None = None,
        preset: str | None = None,
        threads: int = 0,
        hashes: bool = False,
        trust: bool = False,
        cache: str | None = None,
        **arguments: Any,
    ) -> Self:
        """The model in a bundle's folder; parameters and errors as in ``Session.open``.

        Of the other ``arguments`` of transformers those are taken that ask for nothing (``torch_dtype="auto"``, say);
        a UsageError names the first that does.
        """
        _libraries()
        _refuse_unknown(arguments)
        session = Session.open(
            bundle, target=target, preset=preset, threads=threads, hashes=hashes, trust=trust, cache=cache
        )
        return cls(session)

    def __call__(self, input_ids: Any = None, **arguments: Any) -> Any:
        return self.forward(input_ids, **arguments)

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, *, labels: Any = None, **arguments: Any
    ) -> Any:
        """A CausalLMOutput with ``logits (B, S, V)``, ``depth (B, S)`` and, with ``labels (B, S)``, the ``loss``.

        ``attention_mask (B, S)`` tells padding at the beginning or the end of a row, where logits and depth are 0.
        ``policy``, ``max_depth``, ``min_depth`` and ``threshold`` are those of a session. Raises UsageError,
        CapacityError.
        """
        torch, transformers = _libraries()
        depth_options = {name: arguments.pop(name) for name in _DEPTH if name in arguments}
        _refuse_unknown(arguments)
        prompts, first = self._prompts(input_ids, attention_mask)
        shape = _numpy(input_ids).shape
        logits = np.zeros((*shape, self.session.model.vocab_size), np.float32)
        depth = np.zeros(shape, np.int64)
        for rows, length in _of_equal_length(prompts):
            score = self.session.score([prompts[row] for row in rows], **depth_options)
            for place, row in enumerate(rows):
                columns = slice(first[row], first[row] + length)
                logits[row, columns], depth[row, columns] = score.logits[place], score.depth[place]
        made, device = torch.from_numpy(logits), _device(input_ids)
        loss = None if labels is None else _loss(made, labels)
        output = transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=made.to(device))
        output["depth"] = torch.from_numpy(depth).to(device)
        return output

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        streamer: Any = None,
        **arguments: Any,
    ) -> Any:
        """The prompts ``(B, S)`` with what follows them ``(B, S + new)``, rows that end early filled with padding.

        Takes ``max_new_tokens`` or ``max_length``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``,
        ``repetition_penalty``, ``eos_token_id`` (by default the bundle's end tokens), ``pad_token_id``,
        ``stop_strings``, ``num_return_sequences`` and ``return_dict_in_generate`` (which tells ``depths (B, new)`` and
        ``finish_reasons``, too) as transformers does, alone or in ``generation_config``; and of a session ``policy``,
        ``max_depth``, ``min_depth``, ``threshold``, ``chunk``, ``max_lag``, ``draft_depth``, ``draft_tokens`` and
        ``seed``, which is that of the first row: each further one takes the next number. Without it the random state
        of torch decides. The rows run together. Raises UsageError, CapacityError.
        """
        if (inputs is None) == (input_ids is None):
            raise UsageError("generate takes the prompts as input_ids, or as inputs: give one of them")
        given = inputs if input_ids is None else input_ids
        configs = [config for config in (self.generation_config, generation_config) if config is not None]
        values = {name: value for config in configs for name, value in config.to_diff_dict().items()} | arguments
        prompts, _ = self._prompts(given, attention_mask)
        request = self._request(values, _numpy(given).shape[1])
        prompts = [prompt for prompt in prompts for _ in range(request.rows_a_prompt)]
        if attention_mask is None:
            self._refuse_padding(_numpy(given), request)
        if len(prompts) > 1 and request.pad is None:
            raise UsageError(
                f"{len(prompts)} rows may end at different lengths: pass pad_token_id, to fill them up with"
            )
        if streamer is None:
            seeds = None if request.seed is None else [request.seed + row for row in range(len(prompts))]
            results = self.session.generate(prompts, seeds=seeds, **request.options)
        else:
            results = [self._streamed(prompts, streamer, given, request)]
        if any(result.finish_reason == "context" for result in results):
            longest = self.session.max_context
            warnings.warn(f"the text ended where the bundle's longest context of {longest} tokens did", stacklevel=2)
        return _output(given, results, request)

    def can_generate(self) -> bool:
        return True

    def eval(self) -> Self:
        """The model itself, which is never in training."""
        return self

    def to(self, device: Any) -> Self:
        """The model itself, which gives its results where it got the ids; what it runs on is the bundle's target.

        Raises UsageError for a dtype.
        """
        torch, _ = _libraries()
        if isinstance(device, torch.dtype):
            raise UsageError(f"to {device}: a bundle computes as its target does: build one and open it with target=")
        self.device = torch.device(device)
        return self

    def close(self) -> None:
        """Gives back the caches and the graphs."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prompts(self, input_ids: Any, attention_mask: Any) -> tuple[list[list[int]], list[int]]:
        """The tokens of every row without its padding, and the column that each begins in."""
        if input_ids is None:
            raise UsageError("input_ids are missing: give token ids (batch, positions)")
        ids = checked_ids(_numpy(input_ids), self.session.model)
        if attention_mask is None:
            return ids.tolist(), [0] * len(ids)
        mask = _numpy(attention_mask)
        if mask.shape != ids.shape:
            raise UsageError(f"attention_mask has shape {mask.shape}, expected {ids.shape}, that of input_ids")
        prompts, first = [], []
        for row, seen in enumerate(mask != 0):
            columns = np.flatnonzero(seen)
            if not columns.size or columns[-1] - columns[0] + 1 != columns.size:
                what = "hides all" if not columns.size else "hides some in the middle"
                raise UsageError(f"attention_mask {what} of row {row}: only padding before or after a prompt can be")
            prompts.append(ids[row, columns].tolist())
            first.append(int(columns[0]))
        return prompts, first

    def _request(self, values: dict[str, Any], positions: int) -> _Request:
        """The request in ``values``, arguments by name, for prompts of so many positions, padding counted."""
        given = {name: value for name, value in values.items() if value is not None and name not in _OF_FILES}
        options = {name: given.pop(name) for name in (*_DEPTH, *_RUN, "repetition_penalty") if name in given}
        options["max_new_tokens"] = _new_tokens(given, positions)
        samples = flag("do_sample", given.pop("do_sample", False))
        options |= _sampling(given, samples)
        seed = given.pop("seed", None)
        if seed is not None and not samples:
            raise UsageError(f"seed is {seed} without do_sample, which leaves no choice: pass do_sample=True")
        rows = whole("num_return_sequences", given.pop("num_return_sequences", 1))
        if rows < 1 or (rows > 1 and not samples):
            raise UsageError(f"num_return_sequences is {rows}, expected 1, or more with do_sample")
        pad = whole("pad_token_id", given.pop("pad_token_id"), _TOKEN_ID) if "pad_token_id" in given else None
        ends = self.end_ids
        if "eos_token_id" in given:
            end = given.pop("eos_token_id")
            ends = tuple(token_ids("eos_token_id", [end] if isinstance(end, int) else _listed(end)))
        if ends != self.end_ids:
            options["stop_ids"] = ends
        pad = ends[0] if pad is None and ends else pad
        if "stop_strings" in given:
            options["stop_strings"] = texts("stop_strings", given.pop("stop_strings"))
            given.pop("tokenizer", None)  # the bundle's own finds them
        as_dict = flag("return_dict_in_generate", given.pop("return_dict_in_generate", False))
        _refuse_unknown(given)
        return _Request(options, rows, pad, _seed(seed) if samples else None, as_dict)

    def _refuse_padding(self, ids: NDArray[Any], request: _Request) -> None:
        """Raises UsageError where it would be a guess whether a token is padding."""
        ends = request.options.get("stop_ids", self.end_ids)
        if len(ids) > 1 and request.pad not in (None, *ends) and (ids == request.pad).any():
            raise UsageError(
                f"pad_token_id {request.pad} stands in input_ids: pass the attention_mask that the tokenizer made"
            )

    def _streamed(self, prompts: list[list[int]], streamer: Any, given: Any, request: _Request) -> Generation:
        """The one prompt's continuation, which the streamer gets token by token, after the prompt."""
        torch, _ = _libraries()
        if len(prompts) != 1:
            raise UsageError(f"a streamer takes one sequence, got {len(prompts)}: leave it out, or give one prompt")
        try:
            streamer.put(torch.from_numpy(np.array(_numpy(given))))
            for token in self.session.stream(prompts[0], seed=request.seed, **request.options):
                streamer.put(torch.tensor([token.id]))
        finally:  # who reads in another thread must not wait for ever
            streamer.end()
        return self.session.last_generation


def _libraries() -> tuple[Any, Any]:
    """The modules torch and transformers."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise unavailable(error, "a model of transformers", "pip install 'mythos-edge[transformers]'") from error
    return torch, transformers


def _numpy(value: Any) -> NDArray[Any]:
    """An array of a tensor on any device, or of a list."""
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _listed(value: Any) -> Any:
    """A list as it is, and a tensor or an array of any shape as one of one axis."""
    return value if isinstance(value, list | tuple) else np.ravel(_numpy(value))


def _device(value: Any) -> Any:
    return getattr(value, "device", "cpu")


def _of_equal_length(prompts: list[list[int]]) -> list[tuple[list[int], int]]:
    """The rows of each length, with that length."""
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows[len(prompt)].append(row)
    return [(found, length) for length, found in rows.items()]


def _loss(logits: "torch.Tensor", labels: Any) -> Any:
    """The mean cross entropy of every next token; labels of -100 do not count."""
    torch, _ = _libraries()
    targets = torch.from_numpy(_numpy(labels))[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


def _new_tokens(given: dict[str, Any], positions: int) -> int:
    """Takes the arguments on length out of ``given``."""
    new, total = given.pop("max_new_tokens", None), given.pop("max_length", None)
    if new is not None and total is not None:
        raise UsageError(f"max_new_tokens is {new} and max_length is {total}: give one of them")
    if total is None:
        return _NEW_TOKENS if new is None else whole("max_new_tokens", new)
    if whole("max_length", total) <= positions:
        raise UsageError(f"max_length is {total}, but the prompts have {positions} tokens: pass max_new_tokens")
    return whole("max_length", total) - positions


def _sampling(given: dict[str, Any], samples: bool) -> dict[str, Any]:
    """Takes the arguments on sampling out of ``given``; the options of a session that say the same."""
    asked = {name: given.pop(name, default) for name, default in _SAMPLING.items()}
    if samples:
        if asked["temperature"] == 0:
            raise UsageError("temperature is 0 with do_sample: leave do_sample out for the likeliest token")
        return asked
    for name, value in asked.items():
        if value not in _NOT_SAMPLING[name]:
            raise UsageError(f"{name} is {value} without do_sample, which leaves no choice: pass do_sample=True")
    return {"temperature": 0.0}


def _seed(seed: int | None) -> int:
    """The seed that was given, or one that the random state of torch gives."""
    torch, _ = _libraries()
    return int(torch.randint(2**62, ())) if seed is None else whole("seed", seed)


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raises UsageError for the first argument that asks for something that a session cannot do."""
    for name, value in arguments.items():
        if value is None or (name in _NEUTRAL and value == _NEUTRAL[name]):
            continue
        if name == "token_type_ids" and not _numpy(value).any():
            continue  # a tokenizer makes them unasked
        if name in _NEUTRAL or not isinstance(value, bool | int | float | Sequence) or value:
            shown = repr(value) if isinstance(value, str | bool | int | float) else f"a {type(value).__name__}"
            raise UsageError(f"{name} is {shown}: a bundle's session cannot do this: leave it out")


def _output(input_ids: Any, results: list[Generation], request: _Request) -> Any:
    """Prompts and the tokens that follow, as transformers gives them back, in a dictionary when asked for."""
    torch, transformers = _libraries()
    prompts = np.repeat(_numpy(input_ids), request.rows_a_prompt, axis=0)
    new = max(len(result.ids) for result in results)
    pad = 0 if request.pad is None else request.pad
    following, depths = np.full((len(results), new), pad, np.int64), np.zeros((len(results), new), np.int64)
    for row, result in enumerate(results):
        following[row, : len(result.ids)] = result.ids
        depths[row, : len(result.depths)] = result.depths
    sequences = torch.from_numpy(np.concatenate([prompts, following], axis=1)).to(_device(input_ids))
    if not request.as_dict:
        return sequences
    output = transformers.generation.GenerateDecoderOnlyOutput(sequences=sequences)
    output["depths"] = torch.from_numpy(depths)
    output["finish_reasons"] = [result.finish_reason for result in results]
    return output
