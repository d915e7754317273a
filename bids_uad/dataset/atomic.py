from bids_uad.atomic import *  # noqa
