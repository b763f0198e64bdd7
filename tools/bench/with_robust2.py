"""umqtt.robust2, TCP_NODELAY

Needs umqtt/simple2.py, umqtt/robust2.py, umqtt/errno.py.  Used as its example does: reconnect(), send_queue(),
check_msg().
"""

import time

import with_simple2
from work import HOST, TOPIC, numbered


class Entry(with_simple2.Entry):
    clean = False

    def make(self, port):
        from umqtt.robust2 import MQTTClient

        client = MQTTClient(b"bench", HOST, port)
        client.MSG_QUEUE_MAX = 100
        client.CONFIRM_QUEUE_MAX = 1 << 16  # the 11th equal message that is not acknowledged would be a KeyError
        return client

    def numbers(self, qos, last):
        client = self.client
        for n in range(1, last + 1):
            client.publish(TOPIC, numbered(n), False, qos)
            self.turn()
            while client.things_to_do() >= 16:
                self.turn()
        while client.things_to_do():
            self.turn()

    def turn(self):
        client = self.client
        while client.is_conn_issue():
            client.reconnect()
            if client.is_conn_issue():
                time.sleep_ms(100)
        client.send_queue()
        client.check_msg()
