# The project on NVIDIA's PyTorch image, whose torch and Transformer Engine stay as they are (docs/cluster.md).
#
#   docker build --tag megatron-profit:0.1.0 .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --volume /shared:/shared --workdir /shared \
#       megatron-profit:0.1.0 megatron-profit sft --model /shared/Qwen3-14B-Base --data /shared/chats.jsonl
ARG NGC_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron-profit

# The packages that the image is made for. They take the place of its own list of constraints, which holds more
# packages than have to stay.
RUN python -m pip list --format=freeze \
    | grep -iE '^(torch|torchvision|torchao|transformer[-_]engine.*|(pytorch-)?triton|flash[-_]attn|apex|nvidia-.*)==' \
    | sort > /opt/kept.txt
ENV PIP_CONSTRAINT=/opt/kept.txt

COPY pyproject.toml setup.py README.md LICENSE ./
COPY checkpoint_conversion checkpoint_conversion
COPY megatron_profit megatron_profit
COPY examples examples
COPY tools tools
# flash-linear-attention has the kernels of Qwen3.5; it takes the torch and Triton that are there.
RUN python -m pip install --no-cache-dir . 'flash-linear-attention>=0.4'

# No package was replaced. The second command prints the functions that the project changes and does not know in
# these versions, if there are any.
RUN python -m pip list --format=freeze | grep -xFf /opt/kept.txt | sort | diff - /opt/kept.txt \
    && python -m megatron_profit.megatron_patches --check
