"""How small the models are, and their inputs."""

VOCAB = 160
FIRST_SPECIAL = 100  # special tokens live in [100, 160), ordinary text in [4, 100)
HIDDEN = 64
HEADS = 4
LAYERS = 2
MLP = 96
TEXT_LENGTH = 10
DECODER_LENGTH = 7
MAX_PARAMETERS = 5_000_000  # a larger model is given up
SECONDS = 30  # a type that takes longer to build is given up
