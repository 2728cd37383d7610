"""Languages of a multilingual checkpoint: how its tokenizer calls them, and where a translation is told its language.

Multilingual models differ in both. NLLB has deu_Latn for German, mBART de_DE, M2M100 de, Marian >>deu<<. NLLB, M2M100
and mBART-50 put the target language first in the translation, mBART last (and decode from it), Marian and T5 read it in
what stands before the source.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from transformers import FSMTTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..running import InputError

# Two-letter codes (ISO 639-1) and what NLLB calls the language; its first three letters are the ISO 639-3 code
_NLLB = """
af afr_Latn am amh_Ethi ar arb_Arab as asm_Beng ay ayr_Latn az azj_Latn ba bak_Cyrl be bel_Cyrl bg bul_Cyrl bm bam_Latn
bn ben_Beng bo bod_Tibt bs bos_Latn ca cat_Latn cs ces_Latn cy cym_Latn da dan_Latn de deu_Latn dz dzo_Tibt ee ewe_Latn
el ell_Grek en eng_Latn eo epo_Latn es spa_Latn et est_Latn eu eus_Latn fa pes_Arab fi fin_Latn fj fij_Latn fo fao_Latn
fr fra_Latn ga gle_Latn gd gla_Latn gl glg_Latn gn grn_Latn gu guj_Gujr ha hau_Latn he heb_Hebr hi hin_Deva hr hrv_Latn
ht hat_Latn hu hun_Latn hy hye_Armn id ind_Latn ig ibo_Latn is isl_Latn it ita_Latn ja jpn_Jpan jv jav_Latn ka kat_Geor
kk kaz_Cyrl km khm_Khmr kn kan_Knda ko kor_Hang ky kir_Cyrl lb ltz_Latn lg lug_Latn ln lin_Latn lo lao_Laoo lt lit_Latn
lv lvs_Latn mg plt_Latn mi mri_Latn mk mkd_Cyrl ml mal_Mlym mn khk_Cyrl mr mar_Deva ms zsm_Latn mt mlt_Latn my mya_Mymr
nb nob_Latn ne npi_Deva nl nld_Latn nn nno_Latn no nob_Latn ny nya_Latn oc oci_Latn om gaz_Latn or ory_Orya pa pan_Guru
pl pol_Latn ps pbt_Arab pt por_Latn qu quy_Latn rn run_Latn ro ron_Latn ru rus_Cyrl rw kin_Latn sa san_Deva sd snd_Arab
sg sag_Latn si sin_Sinh sk slk_Latn sl slv_Latn sm smo_Latn sn sna_Latn so som_Latn sq als_Latn sr srp_Cyrl ss ssw_Latn
st sot_Latn su sun_Latn sv swe_Latn sw swh_Latn ta tam_Taml te tel_Telu tg tgk_Cyrl th tha_Thai ti tir_Ethi tk tuk_Latn
tl tgl_Latn tn tsn_Latn tr tur_Latn ts tso_Latn tt tat_Cyrl ug uig_Arab uk ukr_Cyrl ur urd_Arab uz uzn_Latn vi vie_Latn
wo wol_Latn xh xho_Latn yi ydd_Hebr yo yor_Latn zh zho_Hans zu zul_Latn
""".split()  # noqa: SIM905
NLLB_OF = dict(zip(_NLLB[::2], _NLLB[1::2], strict=True))


def set_languages(tokenizer: PreTrainedTokenizerBase, source: str, target: str) -> None:
    """Tell a multilingual tokenizer the languages of both sides; it keeps them when it is saved. Others are left alone.

    Raises:
        InputError: it does not know one of them, or is made for other ones.
    """
    if isinstance(tokenizer, FSMTTokenizer):
        pair = [tokenizer.src_lang, tokenizer.tgt_lang]
        if [_matching(lang, pair) for lang in (source, target)] != pair:
            raise InputError(
                f"{tokenizer.name_or_path or 'the checkpoint'} translates {pair[0]} to {pair[1]}, not {source} to "
                f"{target}. Set --source_lang and --target_lang to these, or give another checkpoint."
            )
        return
    if not (codes := languages_of(tokenizer)):
        return
    for side, flag, given in (("src_lang", "--source_lang", source), ("tgt_lang", "--target_lang", target)):
        code = _known(given, codes, flag, tokenizer)
        setattr(tokenizer, side, code)
        tokenizer.init_kwargs[side] = code  # what is saved


def use_languages(
    tokenizer: PreTrainedTokenizerBase, languages: Mapping[str, str], given: Collection[str], trained: Mapping[str, str]
) -> None:
    """Tell the tokenizer of a finished run the languages to translate between: those given, else those stored.

    Args:
        languages: ``source_lang`` and ``target_lang``.
        given: which of these two the user gave.
        trained: the two that the run was trained with; empty if that is not known.

    Raises:
        InputError: the model has no choice of languages, and they are not the ones that it was trained with.
    """
    several = languages_of(tokenizer) or getattr(tokenizer, "supported_language_codes", None)
    for name in given if trained and not several else ():
        if _matching(languages[name], [trained[name]]) is None:
            raise InputError(
                f"--{name} {languages[name]}: the model was trained with {trained[name]}. Leave it out, or "
                "give another --output_dir."
            )
    if languages_of(tokenizer) and tokenizer.tgt_lang is not None:  # else nobody has fine-tuned it
        stored = {"source_lang": tokenizer.src_lang, "target_lang": tokenizer.tgt_lang}
        languages = stored | {name: languages[name] for name in given}
    if given or languages_of(tokenizer):
        set_languages(tokenizer, languages["source_lang"], languages["target_lang"])


def languages_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The codes among which ``src_lang`` and ``tgt_lang`` of a tokenizer choose; none where there is no choice."""
    if not hasattr(type(tokenizer), "src_lang"):
        return []
    if known := getattr(tokenizer, "lang_code_to_id", None):
        return list(known)
    return [token for token in tokenizer.all_special_tokens if re.fullmatch(r"[a-z]{2,3}_[A-Z][A-Za-z]+", token)]


def prefix_of(tokenizer: PreTrainedTokenizerBase, config, source: str, target: str) -> str:
    """What a checkpoint wants before every source sentence, where it says so: its target language, or T5's request.

    What a run stored counts first, unless it is what the checkpoint itself has for some languages: it may now be
    trained for other ones.

    Raises:
        InputError: it translates into several languages, and not into this one.
    """
    stored = getattr(config, "prefix", None)
    codes = getattr(tokenizer, "supported_language_codes", None) or ()  # Marian: >>deu<<
    tasks = getattr(config, "task_specific_params", None) or {}
    own = {f"{code} " for code in codes} | {task.get("prefix") for task in tasks.values() if isinstance(task, dict)}
    if stored and stored not in own:
        return stored
    if codes:
        plain = {code.strip("<>"): code for code in codes}
        return plain[_known(target, plain, "--target_lang", tokenizer)] + " "
    return tasks.get(f"translation_{two_letters(source)}_to_{two_letters(target)}", {}).get("prefix", "")


def set_first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefix: str = "") -> None:
    """Make a model begin its translations as the tokenizer begins the targets it is trained on, and store the prefix.

    Saved with the model (generation_config.json, and ``prefix`` in config.json), so that other programs need no more.
    """
    config, generation = model.config, model.generation_config
    if prefix or getattr(config, "prefix", None):
        config.prefix = prefix
    for name, token in (
        ("pad_token_id", tokenizer.pad_token_id),
        ("eos_token_id", tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id),
        ("decoder_start_token_id", first_not_none(tokenizer.cls_token_id, tokenizer.bos_token_id)),
    ):  # what an encoder and a decoder that were just put together lack
        value = first_not_none(getattr(generation, name, None), getattr(config, name, None), token)
        setattr(generation, name, value)
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    if not languages_of(tokenizer) or isinstance(tokenizer, FSMTTokenizer):
        return
    target, language = target_ids(tokenizer, ["a"])[0], language_id(tokenizer, tokenizer.tgt_lang)
    if target[0] == language:
        generation.forced_bos_token_id = language
    elif target[-1] == language:
        generation.decoder_start_token_id = config.decoder_start_token_id = language
        generation.forced_bos_token_id = None


def two_letters(code: str) -> str:
    """The two-letter code of a language, from any of its codes; its first part where there is none."""
    return next((two for two in sorted(_aliases(code)) if len(two) == 2), re.split("[_-]", code.lower())[0])


def language_id(tokenizer: PreTrainedTokenizerBase, code: str) -> int:
    """The token of a language."""
    known = getattr(tokenizer, "lang_code_to_id", None) or {}
    return known[code] if code in known else tokenizer.convert_tokens_to_ids(code)


def target_ids(tokenizer: PreTrainedTokenizerBase, targets: list[str], **options) -> list[list[int]]:
    """Token ids of translations, as labels of the tokenizer's model."""
    if not isinstance(tokenizer, FSMTTokenizer):
        return tokenizer(text_target=targets, **options)["input_ids"]
    # It has a second vocabulary, and a second language for its word splitter, but no mode for targets
    source = tokenizer.src_lang, tokenizer.encoder
    tokenizer.src_lang, tokenizer.encoder = tokenizer.tgt_lang, {token: i for i, token in tokenizer.decoder.items()}
    try:
        return tokenizer(targets, **options)["input_ids"]
    finally:
        tokenizer.src_lang, tokenizer.encoder = source


def first_not_none(*values):
    """The first of some values that is not None; None if all are."""
    return next((value for value in values if value is not None), None)


# ----------------------------------------------------------------------------------------------------


def _known(given: str, codes: Iterable[str], flag: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's code of a language."""
    codes = list(codes)
    code = _matching(given, codes)
    if code is None:
        raise InputError(
            f"{flag} {given}: no language of {tokenizer.name_or_path or 'the checkpoint'}. It has "
            f"{', '.join(sorted(codes))}."
        )
    return code


def _matching(given: str, codes: Iterable[str]) -> str | None:
    """The code that means a language: the very one, or else the one of the same language (zh: zho_Hans of NLLB)."""
    same = {code.lower().replace("-", "_"): code for code in codes}
    if (wanted := given.lower().replace("-", "_")) in same:
        return same[wanted]
    preferred = [NLLB_OF[two].lower() for two in _aliases(given) if two in NLLB_OF]
    return next(
        (same[code] for code in preferred if code in same),
        next((code for code in codes if _aliases(code) & _aliases(given)), None),
    )


def _aliases(code: str) -> set[str]:
    """The two-letter and three-letter codes of a language, from any code that begins with one of them."""
    base = re.split("[_-]", code.lower())[0]
    return {base} | {name for two, nllb in NLLB_OF.items() if base in (two, nllb[:3]) for name in (two, nllb[:3])}
