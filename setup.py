"""What pyproject.toml cannot say: the recipes of configs/ are part of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["transmla*"]), "transmla.recipes"],
    package_dir={"transmla.recipes": "configs"},
    package_data={"transmla": ["py.typed"], "transmla.recipes": ["*/*.yaml"]},
)
