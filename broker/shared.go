package broker

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"millrace/proto"
)

// SharedEngine is an engine that several workers run lines on. None of them knows what the others have there.
type SharedEngine struct {
	Engine  string   `json:"engine"`
	Workers []string `json:"workers"`
}

const mendShared = "none of them knows what the others have in flight there; stop all but one"

func (e *SharedEngine) String() string {
	return fmt.Sprintf("workers %s run on one engine, %s: one of them is enough; %s", strings.Join(e.Workers, ", "), e.Engine, mendShared)
}

// Shared finds the engines that several workers run lines on, as far as their heartbeats tell that for sure.
func Shared(beats []Beat) (out []SharedEngine) {
	told := map[string]bool{}
	for i := range beats {
		if told[beats[i].ID] {
			continue
		}
		e := SharedEngine{beats[i].Engine, []string{beats[i].ID}}
		for j := range beats[i+1:] {
			if b := &beats[i+1+j]; !told[b.ID] && beats[i].shares(b) {
				e.Workers, told[b.ID] = append(e.Workers, b.ID), true
			}
		}
		if len(e.Workers) > 1 {
			out = append(out, e)
		}
	}
	return out
}

// overlap is for how long two workers must have lived side by side: the heartbeat of one that was killed may come in when
// the next one in its place has begun. One that leaves in order says so.
const overlap = 2 * time.Second

func (b *Beat) shares(o *Beat) bool {
	begun := func(b *Beat) time.Duration { return b.Silent + time.Duration(b.UptimeUS)*time.Microsecond }
	return b.there() && o.there() && begun(b) > o.Silent+overlap && begun(o) > b.Silent+overlap && b.oneEngine(&o.Worker)
}

// there says whether a worker runs lines, or would.
func (b *Beat) there() bool {
	return b.Silent < proto.WorkerSilent && b.State != proto.EngineDraining && b.GivenUp == ""
}

// oneEngine says whether the engines of two workers are surely the same one. At the same address from the same machine
// they are, but for two that started one each; from two machines only a public address leads to the same place. Containers may
// share a network, and go by other names then, and be alone with a PID of 1: the name space of the network tells. Of two on
// one machine that have a network each, only an address that is not their own leads to the same place; a name may not. Where
// that is not known machines may go by one name: then their GPUs tell them apart, and so does a PID that both have, since a
// process takes an engine once.
func (b *Beat) oneEngine(o *proto.Worker) bool {
	at, ip := address(b.Engine)
	if other, _ := address(o.Engine); at == "" || at != other || b.Hosted && o.Hosted {
		return false
	}
	if public(ip) {
		return true
	}
	if b.Network != "" && o.Network != "" {
		boot, _, _ := strings.Cut(b.Network, "/")
		return b.Network == o.Network || ip.IsGlobalUnicast() && strings.HasPrefix(o.Network, boot+"/")
	}
	common := slices.ContainsFunc(b.GPUs, func(g proto.GPU) bool {
		return slices.ContainsFunc(o.GPUs, func(have proto.GPU) bool { return have.UUID == g.UUID })
	})
	return b.Host != "" && b.Host == o.Host && b.PID != o.PID && (common || len(b.GPUs) == 0 || len(o.GPUs) == 0)
}

// address is where an engine is, written as all write it that mean the same place, and its IP address where that has one and no
// name; empty: inside its worker.
func address(engine string) (at string, ip netip.Addr) {
	u, err := url.Parse(engine)
	if err != nil || u.Host == "" {
		return "", ip
	}
	if u.Hostname() == "localhost" {
		u.Host = strings.Replace(u.Host, "localhost", "127.0.0.1", 1)
	}
	ip, _ = netip.ParseAddr(u.Hostname())
	return u.String(), ip
}

// public says whether an address is the same place for all machines; 100.64.0.0/10 is private as well (RFC 6598).
func public(ip netip.Addr) bool {
	return ip.IsGlobalUnicast() && !ip.IsPrivate() && !netip.MustParsePrefix("100.64.0.0/10").Contains(ip)
}
