"""``python -m hybridlm``, the same as the ``hybridlm`` command."""

from hybridlm.cli import main

if __name__ == "__main__":
    main()
