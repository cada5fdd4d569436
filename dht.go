package main

// One DHT request's way, from the stream that it comes on to the answer.
//
// The engine is kad-dht. It reads requests from, and writes answers to, the streams
// of the host that it is given, so kadHost gives it streams of ours: they bound
// what is read (boundedReader), and name other peers in the answer than kad-dht
// does (answers). Between the two, kad-dht calls a hook with each request, which
// counts it and leaves of a record what clients use.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"
)

// kadServer is what a request meets on its way.
type kadServer struct {
	answers *answers
	groups  *groups
	records *recordStore
	peers   *peers
	tally   *tally
}

// serve answers DHT requests to h, and makes none of its own. Close the DHT that it
// returns before h.
func (k *kadServer) serve(h host.Host) (*dht.IpfsDHT, error) {
	return dht.New(kadHost{h, k},
		dht.Mode(dht.ModeServer),
		// On the prefix /ipfs kad-dht insists on IPFS's two validators, so it
		// gets another one, and the protocol by itself.
		dht.ProtocolPrefix("/privstack"),
		dht.V1ProtocolOverride(kadProtocol),
		dht.Validator(newestWins{}),
		dht.Datastore(k.records),
		dht.MaxRecordAge(maxRecordAge),
		dht.ValueGCInterval(0), // recordStore drops by itself what is too old
		dht.DisableProviders(), // unbounded, and clients have none
		// answers takes nobody from the routing table, so nobody is in it: no
		// lookup checks, and no refreshing, which would dial what clients name.
		dht.LookupCheckConcurrency(0),
		dht.DisableAutoRefresh(),
		dht.OnRequestHook(k.hook),
	)
}

// hook is called with each request before kad-dht handles it. It takes a record
// that is not to be stored out of the request; kad-dht then resets the stream.
func (k *kadServer) hook(ctx context.Context, s network.Stream, req *kadpb.Message) {
	if stream := s.(*kadStream); stream.asked {
		piecesOf(s.Conn()).wait(ctx) // the first request has waited when the stream was opened
	} else {
		stream.asked = true
	}
	k.tally.dhtRequest(req.GetType())
	if req.GetType() != kadpb.Message_PUT_VALUE {
		req.Record = nil // a request without a use for one
	} else if err := checkRecord(req); err != nil {
		k.tally.refuse(refusedRecord)
		req.Record = nil
	} else {
		k.records.expect(req.Record, holderOf(s.Conn()))
		id := s.Conn().RemotePeer()
		k.groups.put(string(req.GetKey()), id, time.Now())
		if !k.peers.connected(id) { // it has left meanwhile
			k.groups.leave(id)
		}
	}
	s.(*kadStream).request = req
}

// checkRecord returns why the record that req puts is not to be stored, or nil. It
// removes fields that clients don't use, so that they are neither stored nor
// passed on. What the value says is the clients' business.
func checkRecord(req *kadpb.Message) error {
	rec := req.GetRecord()
	if rec == nil {
		return errors.New("no record")
	}
	key, value := string(rec.GetKey()), rec.GetValue()
	switch {
	case !bytes.Equal(req.GetKey(), rec.GetKey()):
		return errors.New("the record has another key than the request")
	case !strings.HasPrefix(key, recordPrefix) || len(key) == len(recordPrefix):
		return errors.New("key is not under " + recordPrefix)
	case len(key) > maxRecordKey:
		return fmt.Errorf("key of %d bytes is above %d", len(key), maxRecordKey)
	case len(value) == 0:
		return errors.New("value is empty")
	case len(value) > maxRecordValue:
		return fmt.Errorf("value of %d bytes is above %d", len(value), maxRecordValue)
	}
	extras, err := readExtras(rec)
	if err != nil {
		return err
	}
	if len(extras.encoded) > maxRecordExtras {
		return fmt.Errorf("publisher and ttl of %d bytes are above %d", len(extras.encoded), maxRecordExtras)
	}
	rec.ProtoReflect().SetUnknown(extras.encoded)
	return nil
}

// newestWins is the validator that kad-dht is given: checkRecord has looked at a
// record before, and the one that arrives replaces the one that is stored. All
// devices of a group share one key, and the last to write it must be the one found.
// A timestamp inside is no guide: a device with a slow clock would never be found.
type newestWins struct{}

func (newestWins) Validate(string, []byte) error { return nil }

// Select prefers values[0], which is the one arriving.
func (newestWins) Select(string, [][]byte) (int, error) { return 0, nil }

// kadHost is the host that kad-dht is given.
type kadHost struct {
	host.Host
	server *kadServer
}

func (h kadHost) SetStreamHandler(id protocol.ID, handle network.StreamHandler) {
	h.Host.SetStreamHandler(id, func(s network.Stream) {
		handle(&kadStream{Stream: s, server: h.server, frames: frameReader{tally: h.server.tally}})
	})
}

// kadStream is a stream on which kad-dht reads requests and writes an answer to
// each. It has one reader and writer.
//
// A client that gives an answer no room holds up what is in memory for it. So Write
// only gathers an answer, and the next Read sends it: by then kad-dht has let go of the
// request and of its own answer, which took 75 to 115 KiB.
type kadStream struct {
	network.Stream
	server *kadServer
	frames frameReader

	// request is the one being handled, and asked is set from the first one on. hook
	// sets both.
	request *kadpb.Message
	asked   bool

	// answer holds what kad-dht has written of the answer so far, or all of it, as it
	// is sent, once whole.
	answer []byte
	whole  bool

	// booked is how much memory is reserved for request and answer, in bytes.
	booked int
}

func (s *kadStream) Read(p []byte) (int, error) {
	if s.whole {
		if err := s.send(); err != nil {
			return 0, err
		}
	}
	n, err := s.Stream.Read(p)
	longest, frameErr := s.frames.follow(p[:n])
	if frameErr != nil {
		return 0, frameErr
	}
	// kad-dht takes a buffer for the message when it has read its length, and parses it
	// into another copy.
	if bookErr := s.book(2 * longest); bookErr != nil {
		return 0, bookErr
	}
	return n, err
}

// book reserves n bytes for a message in place of what is booked, if that is less and
// n more than streamMemory covers.
func (s *kadStream) book(n int) error {
	if n <= max(s.booked, freeKadMessage) {
		return nil
	}
	if err := s.Scope().ReserveMemory(n-s.booked, network.ReservationPriorityHigh); err != nil {
		s.server.tally.refuse(refusedMemory)
		return err
	}
	s.booked = n
	return nil
}

// send sends the answer that has been gathered.
func (s *kadStream) send() error {
	s.Stream.SetWriteDeadline(time.Now().Add(answerTimeout))
	_, err := s.Stream.Write(s.answer)
	s.answer, s.whole = nil, false // a stream may idle for a minute
	if s.booked > 0 {
		s.Scope().ReleaseMemory(s.booked)
		s.booked = 0
	}
	return err
}

// Write gathers an answer, which kad-dht writes in pieces as a varint length and
// that many bytes (kad-dht spec, RPC messages), and amends it. The next Read sends it.
func (s *kadStream) Write(p []byte) (int, error) {
	s.answer = append(s.answer, p...)
	length, n := binary.Uvarint(s.answer)
	if n <= 0 || uint64(len(s.answer)-n) < length {
		return len(p), nil // not yet whole
	}
	amended, err := s.amend(s.answer[n:])
	if err != nil {
		return 0, err
	}
	s.request = nil
	s.answer = append(binary.AppendUvarint(make([]byte, 0, len(amended)+binary.MaxVarintLen16+1), uint64(len(amended))), amended...)
	s.whole = true
	return len(p), s.book(len(s.answer))
}

// amend returns kad-dht's answer with the peers replaced that it names. It costs a
// client's request nothing that can be measured (BenchmarkAnswer: 0.3 ms each).
func (s *kadStream) amend(answer []byte) ([]byte, error) {
	if t := s.request.GetType(); t != kadpb.Message_FIND_NODE && t != kadpb.Message_GET_VALUE {
		return answer, nil
	}
	resp := new(kadpb.Message)
	if err := proto.Unmarshal(answer, resp); err != nil {
		return nil, err
	}
	resp.CloserPeers = kadpb.PeerInfosToPBPeers(s.server.peers.network, s.server.answers.choose(s.Conn(), s.request))
	return proto.Marshal(resp)
}

var errKadMessageTooLong = fmt.Errorf("DHT message is above %d bytes", maxKadMessage)

// frameReader follows the frames in what is read from a stream, each a varint
// length and that many bytes (kad-dht spec, RPC messages).
type frameReader struct {
	tally  *tally
	body   uint64 // bytes left of the current frame
	header []byte // of the next frame, while incomplete
}

// follow returns the longest length among those that end in read. It fails at a length
// above maxKadMessage: before kad-dht has seen the last byte of that length, so that it
// cannot yet allocate for it.
func (r *frameReader) follow(read []byte) (longest int, err error) {
	for len(read) > 0 {
		if skip := min(r.body, uint64(len(read))); skip > 0 {
			r.body -= skip
			read = read[skip:]
			continue
		}
		r.header = append(r.header, read[0])
		read = read[1:]
		length, size := binary.Uvarint(r.header)
		switch {
		case size == 0 && len(r.header) < binary.MaxVarintLen64: // needs more
			continue
		case size <= 0 || length > maxKadMessage:
			r.tally.refuse(refusedMessage)
			return 0, errKadMessageTooLong
		}
		longest = max(longest, int(length))
		r.body, r.header = length, r.header[:0]
	}
	return longest, nil
}
