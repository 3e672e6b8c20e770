"""The verbs of the ``hybridlm`` command. Each imports what it needs when it runs, so that --help is quick."""
