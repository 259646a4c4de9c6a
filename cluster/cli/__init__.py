"""The command `duet`.

__main__    every command of the packages as a verb
options     flags of the commands of `cluster`
"""
