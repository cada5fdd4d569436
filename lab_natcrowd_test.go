package main

// A crowd for the NAT lab: thousands of strangers in one namespace, whom answers might name
// to a client that looks for another device.

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	quicgo "github.com/quic-go/quic-go"
)

// labCrowdEnv tells the test binary that it is a crowd. It holds the relay's multiaddr with
// its ID, a space, and the crowd's network, such as "11.100".
const labCrowdEnv = "PRIVSTACK_LAB_CROWD"

// crowdSize is the size to which a crowd is asked to grow.
type crowdSize struct {
	Clients int

	// Open is the share of clients that strangers can dial. Packets to the others'
	// addresses are swallowed.
	Open float64

	Err string `json:",omitempty"` // only in the answer
}

// crowdShare is how many of the clients that cannot be dialled share one address; each of
// the others has its own. crowdSink is the port where everything is dropped. crowdTries is
// how often a client tries to join, because a handshake may time out on a machine that is
// busy with thousands of them.
const (
	crowdShare = 200
	crowdSink  = 5999
	crowdTries = 5
)

// runLabCrowd runs the crowd. It reads sizes from in, one JSON object a line, grows, and
// answers each when it has that size, until in ends.
func runLabCrowd(config string, in io.Reader, out io.Writer) error {
	relay, network, _ := strings.Cut(config, " ")
	info, err := peer.AddrInfoFromString(relay)
	if err != nil {
		return err
	}
	var shared *quicgo.Transport
	dec, enc := json.NewDecoder(in), json.NewEncoder(out)
	open, natted := 0, 0
	for {
		var want crowdSize
		if err := dec.Decode(&want); err != nil {
			return err
		}
		var joining sync.WaitGroup
		var failed error
		var mu sync.Mutex
		places := make(chan struct{}, 32) // for handshakes at the same time
		for open+natted < want.Clients {
			who, err := makeLightIdentity()
			if err != nil {
				return err
			}
			tr := shared
			if float64(open) < want.Open*float64(open+natted+1) {
				addr := fmt.Sprintf("%s.%d.%d", network, open/250, open%250+1)
				who.listen = []ma.Multiaddr{ma.StringCast("/ip4/" + addr + "/udp/5001/quic-v1")}
				tr, err = listenOpen(who, addr+":5001")
				open++
			} else {
				addr := fmt.Sprintf("%s.%d.251", network, natted/crowdShare)
				who.listen = []ma.Multiaddr{ma.StringCast(fmt.Sprintf("/ip4/%s/udp/%d/quic-v1", addr, crowdSink))}
				if natted%crowdShare == 0 {
					shared, err = bindTransport(addr + ":5002")
					tr = shared
				}
				natted++
			}
			if err != nil {
				return err
			}
			places <- struct{}{}
			joining.Go(func() {
				defer func() { <-places }()
				var err error
				for range crowdTries {
					var client *lightClient
					if client, err = who.dial(context.Background(), tr, *info); err == nil {
						_, err = client.named(context.Background(), who.id)
					}
					if err == nil {
						return
					}
				}
				mu.Lock()
				failed = err
				mu.Unlock()
			})
		}
		joining.Wait()
		if failed != nil {
			want.Err = failed.Error()
		}
		if err := enc.Encode(want); err != nil {
			return err
		}
	}
}

func bindTransport(addr string) (*quicgo.Transport, error) {
	local, err := net.ResolveUDPAddr("udp4", addr)
	if err != nil {
		return nil, err
	}
	conn, err := net.ListenUDP("udp4", local)
	if err != nil {
		return nil, err
	}
	return &quicgo.Transport{Conn: conn}, nil
}

// listenOpen listens on addr, and answers there as who.
func listenOpen(who lightIdentity, addr string) (*quicgo.Transport, error) {
	tr, err := bindTransport(addr)
	if err != nil {
		return nil, err
	}
	l, err := tr.Listen(&tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		conf, _ := who.tls.ConfigForPeer("")
		return conf, nil
	}}, &quicgo.Config{InitialPacketSize: packetSize})
	if err != nil {
		return nil, err
	}
	go func() { // ends with the process
		for {
			conn, err := l.Accept(context.Background())
			if err != nil {
				return
			}
			go who.over(conn).serve()
		}
	}()
	return tr, nil
}
