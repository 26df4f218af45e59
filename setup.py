"""What ``pyproject.toml`` cannot say: two packages lie outside the one that they belong to."""

from setuptools import find_packages, setup

OUTSIDE = {"mpicoll.kernels": "kernels", "mpicoll.bench": "bench"}

setup(
    packages=[*find_packages(include=["mpicoll", "mpicoll.*"]), *OUTSIDE],
    package_dir=OUTSIDE,
    package_data={
        "mpicoll": ["py.typed"],
        "mpicoll.draw": ["page.html"],
        "mpicoll.simulate": ["machines/*.toml"],
        "mpicoll.trace": ["report.html"],
    },
)
