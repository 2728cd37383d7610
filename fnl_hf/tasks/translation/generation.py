"""Translating with beam search, in batches bounded by tokens, on one process or several."""

from collections.abc import Iterator, Sequence

from torch import distributed
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..running import longest_input, one_line_errors
from .arguments import DataArguments
from .encoding import CHARACTERS


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    num_beams: int | None = None,
    length_penalty: float | None = None,
    min_length: int | None = None,
    max_length: int = 128,
    max_tokens: int = 4000,
    prefix: str = "",
    progress: bool = True,
) -> list[str]:
    """Translations of `sentences`, in their order and of one line each; that of a blank sentence is blank.

    The sentences are translated in batches of similar length. Where there are several processes, all of them must
    call: each translates its share of the batches and returns all translations.

    Args:
        num_beams, length_penalty: of the search. None: as `model.generation_config` says, which also decides
            everything else.
        min_length: tokens of a translation at least, its end not counted. None: as `model.generation_config` says.
        max_length: tokens of an input, and of a translation, at most, or what the model takes. A translation has at
            most twice as many as the longest input of its batch and ten more, so that one that does not end cannot
            hold up the others.
        max_tokens: of a batch: input tokens with padding, times beams. A longer sentence is a batch of its own.
        prefix: put before every sentence.
    """
    model.eval()
    own = model.generation_config
    options = {"num_beams": num_beams, "length_penalty": length_penalty}
    if min_length is not None:
        options["min_length"] = min_length + 1  # with the token that decoding starts from
    options = {name: value for name, value in options.items() if value is not None}
    shortest = options.get("min_length", own.min_length) or 0
    if own.min_new_tokens is not None:  # it comes before min_length
        options["min_new_tokens"] = own.min_new_tokens if min_length is None else min_length
        shortest = options["min_new_tokens"] + 1
    beams = num_beams or own.num_beams or 1
    max_length = min(max_length, longest_input(model.config) or max_length)

    filled = [i for i, sentence in enumerate(sentences) if sentence.strip()]
    # What exceeds max_length is cut before it is tokenized, too: tokenizers in Python take hours for an endless word
    texts = [prefix + sentences[i][: CHARACTERS * max_length] for i in filled]
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    inputs = dict(zip(filled, ids, strict=True))
    rank, processes = _place()

    def most(limit: int) -> dict[str, int]:  # max_new_tokens of a checkpoint would come before max_length
        return {"max_length": limit} if own.max_new_tokens is None else {"max_new_tokens": limit - 1}

    batches = list(_batches({i: len(ids) for i, ids in inputs.items()}, max_tokens // beams))[rank::processes]
    translations = {}
    hidden = not progress or rank > 0
    with tqdm(total=sum(map(len, batches)), desc="Translating", unit="sentence", disable=hidden) as bar:
        for chosen in batches:
            batch = tokenizer.pad({"input_ids": [inputs[i] for i in chosen]}, return_tensors="pt").to(model.device)
            longest = batch["input_ids"].shape[1]
            limit = min(max_length, max(2 * longest + 10, shortest + 1))
            # Only the first of what a checkpoint may return for a sentence
            outputs = model.generate(**batch, **options, **most(limit), num_return_sequences=1)
            for i, text in zip(chosen, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
                translations[i] = " ".join(text.splitlines()).strip()
            bar.update(len(chosen))
    for share in _gathered(translations):
        translations |= share
    return [translations.get(i, "") for i in range(len(sentences))]


def store_search(model: PreTrainedModel, data_args: DataArguments) -> None:
    """Make the search that was asked for the model's own, which is saved with it; the rest stays the checkpoint's, but
    for what has no meaning beside it.

    Raises:
        InputError: it cannot be saved.
    """
    own = model.generation_config
    if data_args.num_beams is not None:
        own.num_beams = data_args.num_beams
        if (own.num_return_sequences or 1) > own.num_beams:
            own.num_return_sequences = 1
        if own.num_beams == 1:  # these are of several beams
            own.length_penalty = own.early_stopping = None
    if data_args.min_length is not None:
        own.min_length = data_args.min_length + 1  # with the token that decoding starts from
        own.min_new_tokens = None  # it would come before
    if data_args.length_penalty is not None and (own.num_beams or 1) > 1:  # else it cannot be saved
        own.length_penalty = data_args.length_penalty
    with one_line_errors(ValueError):
        own.validate()


def _batches(lengths: dict[int, int], max_tokens: int) -> Iterator[list[int]]:
    """Cut the keys into batches of at most `max_tokens` with padding, longest first: memory is needed at once or
    never."""
    order = sorted(lengths, key=lengths.get, reverse=True)
    while order:
        size = max(1, max_tokens // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def _place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    several = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)


def _gathered(share: dict[int, str]) -> list[dict[int, str]]:
    """What this process has, and what the others have."""
    _, processes = _place()
    shares = [share] * processes
    if processes > 1:
        distributed.all_gather_object(shares, share)
    return shares
