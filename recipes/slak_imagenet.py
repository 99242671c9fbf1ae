"""Train SLaK on images; with no arguments a small one on handwritten digits, in minutes.

python recipes/slak_imagenet.py                                  digits, on any machine
python recipes/slak_imagenet.py --data fashion-mnist             Debian's package, or a folder of its files
python recipes/slak_imagenet.py --data PATH                      ImageNet, PATH/train and PATH/val: SLaK-T
python recipes/slak_imagenet.py --data PATH --model slak_base    the same: SLaK-B
python recipes/slak_imagenet.py --data PATH --model slak_micro   a small model on any folder of images

A recipe is a function that returns a complete config; `--dry-run` prints it, `--set` changes a field.

Source of the ImageNet recipes: Liu et al., "More ConvNets in the 2020s" (SLaK), arXiv:2207.03620, section 5
and appendix A, and the published code's README; what differs is listed in `docs/reproduction/`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its own folder is on the path, the source tree is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.data import Augmentation
from recipes.data.fashion_mnist import has_fashion_mnist
from recipes.engine.command import main
from recipes.engine.config import DataConfig, ModelConfig, OptimConfig, RunConfig, SparseConfig
from recipes.engine.errors import UserError
from recipes.engine.job import Config


def digits() -> Config:
    """Return the default: 1,797 digits of scikit-learn, drawn at 32 pixels, in minutes on two cores."""
    return Config(
        name="digits",
        data=DataConfig(
            source="digits",
            second_split="file-order",
            size=32,
            channels=1,
            mixup=0.0,
            cutmix=0.0,
            evaluation_batch=360,
        ),
        augment=Augmentation(flip=0.0, degrees=15.0, translate=0.1, zoom=(0.85, 1.15), shear=10.0),
        model=ModelConfig(name="slak_micro", drop_path_rate=0.1, layer_scale_init=1.0),
        sparse=SparseConfig(drop_fraction=0.3, interval=20),
        optim=OptimConfig(epochs=24, warmup_epochs=3, batch_size=64, ema_decay=0.99),
        # Operators this small gain little from a second thread, and two threads on busy cores wait for each
        # other: 794 images a second on one thread, 21 on two, beside two other programs on two cores.
        run=RunConfig(threads=1),
    )


def fashion_mnist() -> Config:
    """Return the same model on 60,000 images of clothes."""
    return dataclasses.replace(
        digits(),
        name="fashion-mnist",
        data=DataConfig(
            source="fashion-mnist", size=32, channels=1, mixup=0.0, cutmix=0.0, evaluation_batch=500
        ),
        augment=Augmentation(flip=0.5, translate=0.1, zoom=(0.9, 1.1)),
        sparse=SparseConfig(drop_fraction=0.3, interval=100),
        optim=OptimConfig(epochs=5, warmup_epochs=0.5, batch_size=128, ema_decay=0.995),
    )


def image_folder() -> Config:
    """Return a small model for a folder of colour images, at 64 pixels."""
    return dataclasses.replace(
        digits(),
        name="images",
        data=DataConfig(source="", size=64, mixup=0.0, cutmix=0.0, workers=2),
        augment=Augmentation(crop_scale=(0.35, 1.0), policy=None, erasing=0.0),
        model=ModelConfig(name="slak_micro", stem_stride=4, drop_path_rate=0.1, layer_scale_init=1.0),
        sparse=SparseConfig(drop_fraction=0.3, interval=50),
        optim=OptimConfig(epochs=30, warmup_epochs=3, batch_size=64, ema_decay=0.99),
    )


def imagenet_tiny() -> Config:
    """Return SLaK-T on ImageNet-1k as published: 300 epochs at an effective batch of 4096."""
    return Config(
        name="imagenet-slak_tiny",
        data=DataConfig(source="", size=224, mixup=0.8, cutmix=1.0, workers=8),
        augment=Augmentation(),
        model=ModelConfig(name="slak_tiny", width_factor=1.3, drop_path_rate=0.1, layer_scale_init=1e-6),
        sparse=SparseConfig(
            sparsity=0.4, distribution="snip", algorithm="slak", drop_fraction=0.5, interval=2000
        ),
        optim=OptimConfig(
            epochs=300,
            warmup_epochs=20,
            batch_size=128,
            accumulation=32,
            lr=4e-3,
            lr_batch=4096,
            min_lr=1e-6,
            weight_decay=0.05,
            label_smoothing=0.1,
            ema_decay=0.9999,
        ),
        run=RunConfig(precision="bfloat16", checkpoint_interval=100),
    )


def imagenet_small() -> Config:
    """Return SLaK-S on ImageNet-1k as published."""
    return _imagenet("slak_small", drop_path_rate=0.4)


def imagenet_base() -> Config:
    """Return SLaK-B on ImageNet-1k as published."""
    return _imagenet("slak_base", drop_path_rate=0.5)


def _imagenet(model: str, drop_path_rate: float) -> Config:
    tiny = imagenet_tiny()
    return dataclasses.replace(
        tiny,
        name=f"imagenet-{model}",
        model=dataclasses.replace(tiny.model, name=model, drop_path_rate=drop_path_rate),
        sparse=dataclasses.replace(tiny.sparse, drop_fraction=0.3, interval=100),
    )


FOLDER_MODELS = {
    "slak_micro": image_folder,
    "slak_tiny": imagenet_tiny,
    "slak_small": imagenet_small,
    "slak_base": imagenet_base,
}
VARIANTS = {"digits": digits, "fashion-mnist": fashion_mnist, **FOLDER_MODELS}


def choose(data: str | None, model: str | None) -> Config:
    """Return the recipe for what stands after `--data` and `--model`.

    Raises:
        UserError: if there is none.
    """
    fashion = data == "fashion-mnist" or (data is not None and has_fashion_mnist(data))
    if fashion or data == "digits" or (data is None and model is None):
        if model not in (None, "slak_micro"):
            raise UserError(
                f"--model {model}: {data} is for slak_micro; for other models, --data PATH of a folder"
            )
        config = fashion_mnist() if fashion else digits()
        return config if data is None else _with_data(config, data)
    if model not in (None, *FOLDER_MODELS):
        raise UserError(f"--model {model}: the models with a recipe are {', '.join(FOLDER_MODELS)}")
    config = FOLDER_MODELS[model or "slak_tiny"]()
    if data is None:
        return config
    parts = any((Path(data) / part).is_dir() for part in ("train", "val"))
    alone = model == "slak_micro" and Path(data).is_dir() and not parts
    return _with_data(config, data, "stratified" if alone else None)


def _with_data(config: Config, source: str, split: str | None = None) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source, split=split))


if __name__ == "__main__":
    sys.exit(main(choose, (__doc__ or "").partition("\n")[0]))
