"""The text that follows a prompt by the library's decode alone, and tokenizers made small."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def following(library: Tokenizer, prompt: list[int], ids: list[int], special_tokens: bool = False) -> str:
    """The decode of all ids after what it has in common with the decode of the prompt."""
    before, whole = (library.decode(part, skip_special_tokens=not special_tokens) for part in (prompt, prompt + ids))
    places = range(min(len(before), len(whole)) + 1)
    return str(whole)[next(place for place in reversed(places) if before[:place] == whole[:place]) :]


def byte_level(special: list[str], first: tuple[str, ...] = ()) -> Tokenizer:
    """Ids 0 .. 255 are bytes; then come the ``special`` tokens, of which those that are ``first`` move bytes on."""
    symbols = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    library = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in special])
    return library
