"""Config files of Hugging Face folders, as far as they are alike for all families. Standard library only."""

from collections.abc import Mapping
from typing import Any

# What transformers' ``save_pretrained`` and huggingface_hub write beside a model's own fields. None of it changes what
# is computed: it tells how to load, generate or label. Names that other models use for our fields are not among them.
# ``tie_word_embeddings`` is judged by the weights: an untied head is refused there, and the reference always ties.
_HUGGING_FACE = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty library_name license max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id pipeline_tag prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version transformers.js_config typical_p use_bfloat16 use_cache use_return_dict
"""
HUGGING_FACE_FIELDS = frozenset(_HUGGING_FACE.split())


def names_model(config: Mapping[str, Any], model_type: str, architecture: str) -> bool:
    """Whether a config.json says that its model is of that type, or of that class of transformers."""
    classes = config.get("architectures")
    return config.get("model_type") == model_type or (isinstance(classes, list) and architecture in classes)
