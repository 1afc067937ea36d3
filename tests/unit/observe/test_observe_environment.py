import subprocess
import sys

from trl_ray.observe.environment import describe_environment, format_environment, package_version


def test_the_environment_names_versions_and_the_machine() -> None:
    facts = describe_environment()
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert facts["numpy"] == package_version("numpy") and "usable" in facts["cpus"] and facts["gpu"]
    assert package_version("no-such-package-anywhere") == "not installed"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from trl_ray.observe.environment import describe_environment; describe_environment(); "
        "print({'torch', 'ray', 'vllm', 'transformers', 'wandb'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def test_names_are_aligned() -> None:
    assert format_environment({"a": "1", "long": "2"}) == "a:    1\nlong: 2"
