"""placeholder"""


def write_report(path):
    return None
