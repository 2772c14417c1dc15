"""`distseg report`: one HTML page about one or several runs that needs neither a network nor
another file.
"""
