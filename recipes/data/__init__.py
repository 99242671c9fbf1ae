"""Data for the recipes: data sets, augmentation and loaders with keyed randomness.

Open a data set, ask for its two transforms, and build loaders:

    train, held_out = open_data("digits")
    train_transform, evaluation_transform = transforms(train, size=32, augmentation=Augmentation(degrees=10))
    loader = train_loader(train, train_transform, batch_size=64, seed=0)
    loader.batch_sampler.set_position(epoch=3, batch=10)
"""

from recipes.data.affine import Affine
from recipes.data.augment import EvaluationTransform, TrainTransform
from recipes.data.digits import open_digits
from recipes.data.erasing import RandomErasing
from recipes.data.errors import DataError
from recipes.data.fashion_mnist import open_fashion_mnist
from recipes.data.image_folder import FolderImages, open_image_folder
from recipes.data.images import KeyedImages, TensorImages
from recipes.data.keyed import Stream, generator
from recipes.data.loader import evaluation_loader, train_loader
from recipes.data.mixing import Mixing
from recipes.data.pipelines import Augmentation, transforms
from recipes.data.random_augment import RandAugment
from recipes.data.sampler import EpochSampler, EvaluationSampler
from recipes.data.sources import open_data

__all__ = [
    "Affine",
    "Augmentation",
    "DataError",
    "EpochSampler",
    "EvaluationSampler",
    "EvaluationTransform",
    "FolderImages",
    "KeyedImages",
    "Mixing",
    "RandAugment",
    "RandomErasing",
    "Stream",
    "TensorImages",
    "TrainTransform",
    "evaluation_loader",
    "generator",
    "open_data",
    "open_digits",
    "open_fashion_mnist",
    "open_image_folder",
    "train_loader",
    "transforms",
]
