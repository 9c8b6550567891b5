"""What is watched: functions that an exception leaves."""


def run(case, function):
    return function()


def raise_often(number):
    raise ValueError("number %d" % number)


def ends_normally(error):
    raise error
