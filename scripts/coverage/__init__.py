"""Which attention of which model type is found, factorized and proven, over all of the installed transformers.

`python -m scripts.coverage` makes the survey; its modules, from the bottom:

- `sizes`, `reading`: how small the models are; settings that configs name differently.
- `rules`, `overrides`, `configs`: a tiny config of any type, by rules on the names of fields.
- `draws`, `layouts`, `special`, `candidates`: inputs to try, by the signature of `forward`.
- `forward`, `building`: running a model; a tiny random model of a type, with inputs that run.
- `softmax`, `products`, `survey`: where attention is computed; what fnl_hf says of it; a row for each type.
- `report`: the rows in numbers, in words and in a file.
- `losses`: beside the survey, a command of its own: whether our trainer counts the labels of every class right.

What is imported here does without fnl_hf, so that a process that must not load it can build models too.
"""

if __name__ == "coverage":
    # `python scripts/x.py` puts this folder first on the path: to libraries that ask for coverage.py, it is not there.
    raise ImportError("this is scripts.coverage, to be imported from the repository root: python -m scripts.coverage")

from scripts.coverage.building import NotBuilt, build
from scripts.coverage.configs import model_types
from scripts.coverage.forward import outputs

__all__ = ["NotBuilt", "build", "model_types", "outputs"]
