"""Which models are encoders: each of their tokens sees the whole text."""

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
)

# Have a language model that reads forwards, but read in both directions where nothing is generated.
IN_BOTH_DIRECTIONS = ("xlnet",)


def encoder_fault(config: PretrainedConfig) -> str | None:
    """What keeps a model of this configuration from being an encoder, in words that follow its
    name; None for an encoder.

    The tokens of a decoder see only what is before them. The classifier of one that was an encoder
    (`is_decoder` in its config.json) reads a first token that has seen nothing of the text. That of
    GPT-2 and its kind reads the last token that is not the configuration's `pad_token_id`, whatever
    the tokenizer pads with, and fails where there is none.
    """
    if config.is_encoder_decoder:
        return "has a decoder too"
    if getattr(config, "is_decoder", False) or _reads_forwards(config):
        return f"is a decoder, of type {config.model_type}: its tokens see only what is before them"
    return None


def _reads_forwards(config: PretrainedConfig) -> bool:
    # As EmbeddingGemma has it: an encoder made of a decoder.
    if getattr(config, "use_bidirectional_attention", False):
        return False
    if not getattr(config, "is_causal", True):
        return False
    kind = type(config)
    return (
        kind in MODEL_FOR_CAUSAL_LM_MAPPING
        and kind not in MODEL_FOR_MASKED_LM_MAPPING
        and config.model_type not in IN_BOTH_DIRECTIONS
    )
